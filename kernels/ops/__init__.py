"""The operators, one per file: the mathematics, the checks, the plain PyTorch reference and the registration."""
