"""Models as they are used, in PyTorch or ONNX Runtime. Used by deploy and export."""
