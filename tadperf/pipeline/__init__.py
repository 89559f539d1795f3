"""Runs complete jobs, from a config to a result: the commands distill, refine, sweep, experts, audit and evaluate."""
