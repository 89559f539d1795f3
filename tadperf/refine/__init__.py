"""Generates images from prototypes with a diffusion model, and regenerates those that a detector rejects.

Follows label-consistent distillation with detector-guided refinement (arXiv 2507.13074). Its abstract states the rule
for anomalies, the pool of the k most confident candidates and the choice of the least similar one. The rest is ours.
"""
