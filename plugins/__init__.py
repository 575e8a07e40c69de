"""Custom operators of the ``ingot`` domain: meaning, shape rule, ONNX schema and kernels of each."""
