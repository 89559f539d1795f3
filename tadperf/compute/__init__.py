"""Devices, processes, threads, CUDA graphs and compilers."""
