"""Images made by a diffusion model from prototypes, judged by a detector and made again where it objects.

After label-consistent distillation with detector-guided refinement (arXiv 2507.13074), of which the abstract states the
anomaly rule, the pool of the k most confident candidates and the choice of the least similar; the rest is tadperf's.
"""
