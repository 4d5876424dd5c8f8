"""Backends run the graphs: TensorRT and TensorRT-RTX engines, or ONNX Runtime on a GPU or the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BackendError

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from .base import Backend

__all__ = ["BACKENDS", "open_backend"]

BACKENDS = ("auto", "ort-cpu", "ort-cuda", "ort-tensorrt-rtx", "tensorrt", "tensorrt-rtx")
_ENGINES = ("tensorrt", "tensorrt-rtx")


def open_backend(name: str, bundle: Bundle, *, threads: int | None = None) -> Backend:
    """The backend of that name for a bundle; graphs are loaded when first used.

    Args:
        name: one of ``BACKENDS``. ``auto`` takes the engines that this machine can run, with ONNX Runtime for graphs
            that have none; else ``ort-cuda`` where a CUDA device can be used; else ``ort-cpu``. The backend's own name
            says what was taken, and a RuntimeWarning why an engine was not.
        threads: CPU threads of one operator; all physical cores this process may use if None.

    Raises:
        BackendError: unknown name, a missing package, or a bundle this backend cannot run; says what to do.
        BundleError: the bundle's list of engines cannot be trusted.
    """
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; known backends: {', '.join(BACKENDS)}")
    if name in _ENGINES:
        from .tensorrt.backend import TrtBackend

        return TrtBackend(bundle, name)
    engines = None
    if name == "auto":
        from .select import engines_here

        engines = engines_here(bundle)
    if engines is not None and not engines.missing:
        return engines
    from .onnxruntime.backend import OrtBackend, cuda_usable

    if name == "auto":
        name = "ort-cuda" if cuda_usable() else "ort-cpu"
    ort = OrtBackend(bundle, device=name.removeprefix("ort-"), threads=threads)
    if engines is None:
        return ort
    from .composite import MixedBackend

    return MixedBackend(engines, ort)
