"""Kernels for CPUs: in C++, compiled ahead of time for every instruction set there is."""
