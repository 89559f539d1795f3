"""Whole runs, from a config to a result: the commands distill, refine, sweep, experts and evaluate."""
