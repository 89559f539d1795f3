"""Describes a run by values: its config, its data, and the samples that it learns from."""
