"""Load ONNX Runtime's TensorRT-RTX plugin (``onnxruntime-ep-nv-tensorrt-rtx``)."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from ...errors import BackendError

MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
_INSTALL = "pip install onnxruntime-ep-nv-tensorrt-rtx"
_lock = threading.Lock()


def plugin_devices(ort: Any) -> list[Any]:
    """The devices that the plugin offers, once it is registered with ONNX Runtime, which a process does once.

    Raises:
        BackendError: it is not installed, does not load, or offers none.
    """
    try:
        plugin = importlib.import_module(MODULE)
    except ImportError as error:
        raise BackendError(f"the plugin is not installed ({error}): {_INSTALL}") from error
    with _lock:
        devices = _devices(ort)
        if not devices:
            try:
                ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
            except Exception as error:  # onnxruntime's errors have no common base
                text = str(error).strip().splitlines()[0]
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} cannot load the TensorRT-RTX plugin: {text}. It needs an NVIDIA "
                    "driver and onnxruntime 1.24 or newer; 'omniport doctor' says what is here"
                ) from error
            devices = _devices(ort)
    if not devices:
        raise BackendError(
            "the TensorRT-RTX plugin finds no GPU that it can use (Ampere, RTX 30 or later): check nvidia-smi, or use "
            "backend 'ort-cuda' or 'ort-cpu'"
        )
    return devices


def _devices(ort: Any) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
