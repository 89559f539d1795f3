"""Benchmarks of operators and stages, studies of the methods, and tools."""
