"""Train a compressed model to agree with the dense one."""
