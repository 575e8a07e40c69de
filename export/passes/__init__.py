"""Small graph passes over onnx-ir models, one file each."""
