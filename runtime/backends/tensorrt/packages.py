"""The Python packages of TensorRT and TensorRT-RTX: whether they are here and whole, and what installs them.

Each is three: the package that is asked for, its bindings and its libraries. The usual index has all of TensorRT-RTX,
and of TensorRT no libraries; JetPack brings a TensorRT of its own, which pip cannot replace.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from ...errors import BackendError
from ...system import host

#: builder -> its Python module
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
#: builder -> the extra that brings it
EXTRAS = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
#: NVIDIA's own index: what the tensorrt packages of PyPI are made of is there and nowhere else
NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"
#: for a machine whose TensorRT is JetPack's
JETPACK = (
    "sudo apt-get install nvidia-jetpack, then install omniport and onnx into a virtual environment made with "
    "--system-site-packages: TensorRT is JetPack's"
)
#: for that machine, where TensorRT-RTX is asked for: it is made for Linux and Windows on x86-64, and for DGX Spark
NOT_FOR_JETSON = (
    "TensorRT-RTX is not made for Jetson boards. Do this on an x86-64 machine; the board builds its engines with "
    "TensorRT: omniport build"
)


def installed() -> list[str]:
    """Builders whose Python package is there; nothing is imported."""
    return [builder for builder, module in MODULES.items() if importlib.util.find_spec(module) is not None]


def installed_version(builder: str) -> str | None:
    """Version of an installed builder, from its metadata; None if that does not say."""
    for name in (builder, f"{builder}-cu13", f"{builder}-cu12", MODULES[builder]):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def how_to_install(builder: str, jetson: bool | None = None, options: str = "") -> str:
    """What to do on a machine to have a builder.

    Args:
        jetson: whether the machine has JetPack; this one's if None.
        options: more of ``pip install``.
    """
    if host.is_jetson() if jetson is None else jetson:
        return JETPACK if builder == "tensorrt" else NOT_FOR_JETSON
    line = f"pip install {options}'omniport[{EXTRAS[builder]}]'"
    return f"{line} {NVIDIA_INDEX} (CUDA 13: driver 580 or newer)" if builder == "tensorrt" else line


def import_builder(builder: str) -> Any:
    """The Python module of a builder.

    Raises:
        BackendError: it is not installed, or does not import; says what to install.
    """
    name = MODULES[builder]
    if importlib.util.find_spec(name) is None:
        raise BackendError(absent(builder))
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken native library can raise anything
        lacks = "without its libraries" if "cannot open shared object file" in str(error) else "but does not import"
        raise BackendError(
            f"{builder} is installed here {lacks} ({type(error).__name__}: {error}). Install it again: "
            f"{how_to_install(builder, options='--force-reinstall ')}"
        ) from error


def absent(builder: str) -> str:
    """Why a builder that is not installed cannot be used, for a message."""
    kinds = {"bindings": "Python bindings", "libs": "libraries"}
    parts = [kind for end, kind in kinds.items() if importlib.util.find_spec(f"{MODULES[builder]}_{end}") is not None]
    only = f" but for its {' and '.join(parts)}" if parts else ""
    return f"{builder} is not installed here{only}: {how_to_install(builder)}"


def why_not(builder: str) -> str:
    """Why a builder cannot be used here, and what mends it; empty if it can. Imports it."""
    try:
        import_builder(builder)
    except BackendError as error:
        return str(error)
    return ""
