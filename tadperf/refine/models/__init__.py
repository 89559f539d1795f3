"""Diffusion models that make images: one file for each kind."""
