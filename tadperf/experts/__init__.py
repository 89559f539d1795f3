"""Expert trajectories: trains them and stores them."""
