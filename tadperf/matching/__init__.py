"""Trajectory matching: the objective, its exact gradient, the loop."""
