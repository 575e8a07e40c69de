"""Capture of an eager graph into canonical ONNX, lowering to a target, and the ingot folder."""
