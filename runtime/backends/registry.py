"""The backends by name. One is added by a module with a ``LOADER`` of its own, and a line in `BACKENDS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..bundle.recipes import PRECISION_DTYPES
from ..errors import BackendError, UsageError

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


#: what ``compute`` may be: coarser than the float32 that a graph is in
COMPUTE = ("bf16",)


def find_loader(name: str) -> Loader:
    """What opens the backend of that name.

    Raises:
        BackendError: unknown name.
    """
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; known backends: {', '.join(BACKENDS)}")
    loader: Loader = importlib.import_module(BACKENDS[name], __package__).LOADER
    return loader


def open_backend(name: str, bundle: Bundle, *, threads: int | None = None, compute: str | None = None) -> Backend:
    """The backend of that name for a bundle; graphs are loaded when first used.

    Args:
        name: one of ``BACKENDS``. ``auto`` takes the engines that this machine can run, with ONNX Runtime for graphs
            that have none; else ``ort-cuda`` where a CUDA device can be used; else ``ort-cpu``, and ``openvino`` for
            the graphs that it was measured to be quicker with. The backend's own name says what was taken, and a
            RuntimeWarning why an engine was not.
        threads: CPU threads of one operator; all physical cores this process may use if None.
        compute: ``bf16`` has graphs of float32 values computed in bfloat16, less exactly; None: as the graphs say.

    Raises:
        BackendError: unknown name, a missing package, or a bundle this backend cannot run; says what to do.
        BundleError: the bundle's list of engines cannot be trusted.
        UsageError: ``compute`` is unknown, or this backend computes as the graphs say.
    """
    loader = find_loader(name)
    if compute is None:
        return loader.open(name, bundle, threads)
    if compute not in COMPUTE:
        raise UsageError(f"compute is {compute!r}; {' or '.join(COMPUTE)} was expected, or None")
    if loader.open_in is None:
        raise UsageError(f"backend {name!r} computes as the bundle's graphs say; {compute} is for backend 'openvino'")
    return loader.open_in(name, bundle, threads, PRECISION_DTYPES[compute])
