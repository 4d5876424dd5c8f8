"""The two packages that carry the module ``onnxruntime``: which of them a machine wants, and how to get it.

``onnxruntime`` and ``onnxruntime-gpu`` write the same files. Whichever is installed last is imported, and removing
either takes files of both. So both are removed before one is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

from ...errors import BackendError
from ...system import host

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
INSTALL_GPU = "pip install 'omniport[ort-gpu]'"
#: leaves the CUDA provider, whatever was installed before
MEND_GPU = f"pip uninstall -y {' '.join(DISTRIBUTIONS)} && {INSTALL_GPU}"
#: platform.machine() of the processors that onnxruntime-gpu is published for
_GPU_MACHINES = ("x86_64", "amd64")


def gpu_published(machine: str | None = None) -> bool:
    """Whether onnxruntime-gpu is published for a processor, this machine's if None."""
    return (machine or platform.machine()).lower() in _GPU_MACHINES


def wanted_extra() -> str:
    """The extra that brings the ONNX Runtime for this machine."""
    return "ort-gpu" if gpu_published() and host.gpu_capability() is not None else "ort"


def install_line() -> str:
    """What installs ONNX Runtime where there is none."""
    return f"pip install 'omniport[{wanted_extra()}]'"


def mend_line() -> str:
    """What leaves one whole ONNX Runtime, whatever was installed before."""
    return f"pip uninstall -y {' '.join(DISTRIBUTIONS)} && {install_line()}"


def installed() -> dict[str, str]:
    """Versions of the packages that are installed, by name."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def import_onnxruntime() -> Any:
    """onnxruntime, imported when it is first needed, without the telemetry of its official builds.

    That would send what runs here to Microsoft, and a fork joins its thread at exit: it hangs or crashes.

    Raises:
        BackendError: it is not installed, or lacks files; says what to install.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        if installed():
            raise BackendError(f"onnxruntime does not import ({error}): {mend_line()}") from error
        raise BackendError(f"onnxruntime is not installed ({error}): {install_line()}") from error
    except Exception as error:  # a broken native library can raise anything
        raise BackendError(f"onnxruntime does not import ({type(error).__name__}: {error}): {mend_line()}") from error
    if not hasattr(module, "InferenceSession"):  # a folder that an uninstalled package left behind
        raise BackendError(f"onnxruntime lacks its files, of which another package took some: {mend_line()}")
    return module
