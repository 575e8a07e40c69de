"""Custom operators of the ``ingot`` domain: each one's meaning, shape rule, ONNX schema and kernels."""
