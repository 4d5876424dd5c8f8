"""From a torch module to an ONNX file: tracing, passes, mixed precision, streaming the weights."""
