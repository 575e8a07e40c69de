"""Numerical validation of an ingot against the eager PyTorch graph."""
