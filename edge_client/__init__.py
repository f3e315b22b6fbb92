"""What runs on a device: train, encode, exchange. Nothing here imports torch, onnx, the server or the export."""
