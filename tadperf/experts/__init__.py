"""Expert trajectories: trains experts, stores them and reads them."""
