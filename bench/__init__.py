"""Benchmarks: one file per operator and per stage."""
