"""What runs the graphs: ONNX Runtime on the CPU or an NVIDIA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BackendError

if TYPE_CHECKING:
    from ..bundle import Bundle
    from .base import Backend

__all__ = ["BACKENDS", "open_backend"]

BACKENDS = ("auto", "ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx")


def open_backend(name: str, bundle: Bundle, *, threads: int | None = None) -> Backend:
    """The backend of that name for a bundle; graphs are loaded when first used.

    Args:
        name: one of ``BACKENDS``. ``auto`` takes ``ort-cuda`` where a CUDA device can be used, else ``ort-cpu``.
        threads: CPU threads of one operator; all physical cores this process may use if None.

    Raises:
        BackendError: unknown name, a missing package, or a bundle this backend cannot run; says what to do.
    """
    if name in ("tensorrt", "tensorrt-rtx"):
        raise BackendError(
            f"backend {name!r} needs engines built from the bundle, which come with a later release; "
            "'ort-cpu' and 'ort-cuda' run the bundle as it is"
        )
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; known backends: {', '.join(BACKENDS)}")
    from .ort import OrtBackend, cuda_usable

    if name == "auto":
        name = "ort-cuda" if cuda_usable() else "ort-cpu"
    return OrtBackend(bundle, device="cuda" if name == "ort-cuda" else "cpu", threads=threads)
