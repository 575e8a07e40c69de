"""Custom operators of the ``ingot`` domain: their meaning, ONNX schemas and kernels."""
