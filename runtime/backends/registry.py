"""The backends by name. One is added by a module with a ``LOADER`` of its own, and a line in `BACKENDS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import BackendError

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from .base import Backend, Loader

#: name -> module whose ``LOADER`` opens it, beside this one where it begins with a dot; imported when asked for
BACKENDS = {
    "auto": ".select",
    "ort-cpu": ".onnxruntime.backend",
    "ort-cuda": ".onnxruntime.backend",
    "ort-tensorrt-rtx": ".onnxruntime.backend",
    "openvino": ".openvino.backend",
    "tensorrt": ".tensorrt.backend",
    "tensorrt-rtx": ".tensorrt.backend",
}


def find_loader(name: str) -> Loader:
    """What opens the backend of that name.

    Raises:
        BackendError: unknown name.
    """
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; known backends: {', '.join(BACKENDS)}")
    loader: Loader = importlib.import_module(BACKENDS[name], __package__).LOADER
    return loader


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
    return find_loader(name).open(name, bundle, threads)
