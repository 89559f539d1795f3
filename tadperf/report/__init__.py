"""Pictures of the results of a run."""
