"""ONNX Runtime's execution providers: the TensorRT-RTX plugin, and what a GPU's provider left on the CPU.

ONNX Runtime moves shape arithmetic to the CPU on purpose, and without a word every node that the GPU's provider has no
kernel for. One such node in a decoder copies its tensors to the host and back at every step.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...bundle.parts import PARTS
from ...errors import BackendError

#: the TensorRT-RTX provider's package, which is apart from onnxruntime
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL_PLUGIN = "pip install onnxruntime-ep-nv-tensorrt-rtx"
#: device -> provider
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
#: what arithmetic on shapes and positions is made of
_SHAPE_OPERATORS = frozenset(
    "Shape Size Gather Slice Concat Squeeze Unsqueeze Range Constant ConstantOfShape Identity Cast Add Sub "  # noqa: SIM905
    "Mul Div Mod Neg Min Max ReduceProd Equal Less LessOrEqual Greater GreaterOrEqual Not And Or Where".split()
)
_lock = threading.Lock()


def plugin_devices(ort: Any) -> list[Any]:
    """The devices that the plugin offers, once it is registered with ONNX Runtime, which a process does once.

    Raises:
        BackendError: it is not installed, does not load, or offers none.
    """
    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        raise BackendError(f"the plugin is not installed ({error}): {INSTALL_PLUGIN}") from error
    with _lock:
        devices = _plugin_devices(ort)
        if not devices:
            try:
                ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
            except Exception as error:  # onnxruntime's errors have no common base
                text = str(error).strip().splitlines()[0]
                raise BackendError(
                    f"ONNX Runtime {ort.__version__} cannot load the TensorRT-RTX plugin: {text}. It needs an NVIDIA "
                    "driver and onnxruntime 1.24 or newer; 'omniport doctor' says what is here"
                ) from error
            devices = _plugin_devices(ort)
    if not devices:
        raise BackendError(
            "the TensorRT-RTX plugin finds no GPU that it can use (Ampere, RTX 30 or later); 'omniport doctor' "
            "says what is here. Use backend 'ort-cuda' or 'ort-cpu'"
        )
    return devices


def _plugin_devices(ort: Any) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDERS["tensorrt-rtx"]]


def record_placement(options: Any) -> None:
    """Let a session remember where its nodes went. Releases before 1.24 take no notice."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def nodes_by_provider(session: Any) -> dict[str, list[tuple[str, str]]]:
    """(operator, name) of the nodes that each provider took; empty where ORT cannot tell."""
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    found: dict[str, list[tuple[str, str]]] = {}
    for part in () if ask is None else ask():
        found.setdefault(part.ep_name, []).extend((node.op_type, node.name) for node in part.get_nodes())
    return found


def host_nodes(session: Any) -> tuple[tuple[str, str], ...]:
    """(operator, name) of every node on the CPU that is no shape arithmetic; empty where ORT cannot tell."""
    nodes = nodes_by_provider(session).get(PROVIDERS["cpu"], [])
    return tuple(node for node in nodes if node[0] not in _SHAPE_OPERATORS)


def warn_of_host_nodes(graph: str, provider: str, nodes: Iterable[tuple[str, str]]) -> None:
    """Warn if a graph that runs often has work on the CPU."""
    found = list(nodes)
    if not found or graph not in PARTS or not PARTS[graph].often:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in found).most_common())
    names = ", ".join(repr(name) for _, name in found[:5])
    warnings.warn(
        f"{len(found)} nodes of graph {graph!r} run on the CPU, because {provider} has no kernels for them ({kinds}; "
        f"the first are {names}): every run copies their tensors. Upgrade ONNX Runtime, or export in another "
        "--precision",
        RuntimeWarning,
        stacklevel=2,
    )
