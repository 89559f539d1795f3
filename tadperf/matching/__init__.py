"""Trajectory matching: the objective, its exact gradient and the loop."""
