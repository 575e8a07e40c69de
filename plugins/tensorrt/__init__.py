"""TensorRT plugins of Ingot's operators, in Python and in C++, over one library of kernels."""
