"""Backends run the graphs: TensorRT and TensorRT-RTX engines, or ONNX Runtime on a GPU or the CPU."""

from .registry import BACKENDS, open_backend

__all__ = ["BACKENDS", "open_backend"]
