"""Images made by a diffusion model from prototypes, checked by a detector, and generated again if they fail the check.

Follows label-consistent distillation with detector-guided refinement (arXiv 2507.13074). Its abstract states the rule
for anomalies, the pool of the k most confident candidates and the choice of the least similar one. The rest is ours.
"""
