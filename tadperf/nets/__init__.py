"""Networks, their training and their accuracy."""
