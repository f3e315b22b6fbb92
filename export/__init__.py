"""PyTorch to bundle: a whole training step as plain ONNX."""
