"""A run as values: its config, its data, the samples that it learns from."""
