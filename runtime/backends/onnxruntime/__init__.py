"""The ONNX Runtime backend, on the CPU or an NVIDIA GPU."""
