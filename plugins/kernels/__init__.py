"""GPU kernels in the Triton language: run on the CPU by its interpreter, compiled ahead of time."""
