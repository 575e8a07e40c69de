"""Eager PyTorch graphs of the supported architectures, one file each, and the checkpoint reader."""
