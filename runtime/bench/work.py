"""Count the operations and bytes of a graph run from ONNX Runtime's profile.

The profile names the operators that really ran, with the shapes that they had. So it also says where the time went.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.onnxruntime.backend import OrtBackend, OrtGraph
from ..bundle.reader import Bundle

_PRODUCTS = {
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "MatMulNBits",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
_CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger"}


@dataclass(frozen=True)
class Profile:
    """One run: operations (a multiplication and an addition are two), and seconds by operator, largest first."""

    operations: float
    seconds: dict[str, float]


def profile_run(bundle: Bundle, name: str, threads: int, run: Callable[[OrtGraph], object]) -> Profile:
    """Run a graph once, after a warm-up, in a separate session that keeps a profile."""
    with tempfile.TemporaryDirectory(prefix="omniport-profile-") as folder:
        backend = OrtBackend(bundle, threads=threads, profiles=Path(folder))
        graph = backend.graph(name)
        run(graph)
        run(graph)
        events = json.loads(graph.end_profile().read_text(encoding="utf-8"))
        backend.close()
    return read_profile(events)


def weight_bytes(bundle: Bundle, name: str) -> int:
    """Size of a graph's weights as they are stored."""
    manifest = bundle.manifest
    return sum(manifest.files[file].size for file in manifest.graphs[name].data)


def read_profile(events: list[dict[str, Any]]) -> Profile:
    """The last run of a profile."""
    begin = max(event["ts"] for event in events if event["name"] == "model_run")
    seconds: dict[str, float] = {}
    operations = 0.0
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < begin:
            continue
        arguments = event["args"]
        kind = arguments["op_name"]
        seconds[kind] = seconds.get(kind, 0.0) + event["dur"] / 1e6
        operations += _operations(kind, _shapes(arguments, "input"), _shapes(arguments, "output"))
    return Profile(operations, dict(sorted(seconds.items(), key=lambda item: -item[1])))


def _shapes(arguments: Mapping[str, Any], side: str) -> list[list[int]]:
    """Shapes of a node's inputs or outputs: the profile has one {type: shape} for each."""
    return [next(iter(entry.values()), []) for entry in arguments.get(f"{side}_type_shape", [])]


def _operations(kind: str, inputs: list[list[int]], outputs: list[list[int]]) -> float:
    if kind in _PRODUCTS:
        return 2.0 * math.prod(outputs[0]) * inputs[0][-1]
    if kind in _CONVOLUTIONS:  # weight [out, in / groups, kernel...]
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if kind == "QLinearConv":  # a scale and a zero point come behind each: the weight is the fourth input
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[3][1:])
    if kind == "ConvTranspose":  # weight [in, out / groups, kernel...]: every input meets all of it
        return 2.0 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind == "Attention":  # q [B, H, S, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv]
        query, key, value = inputs[:3]
        return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0.0
