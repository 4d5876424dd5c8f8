"""Small ONNX graphs that compute the same in several forms, and their time on one thread, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


class GraphMaker:
    """Collects nodes of one graph, each with one output that it names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[str] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def __call__(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        name = output or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def input(self, name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> str:
        """Declare an input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def floats(self, value: Any) -> str:
        """A constant of float32."""
        return self._constant(np.asarray(value, np.float32))

    def integers(self, *values: int) -> str:
        """A constant of int64, of one axis."""
        return self._constant(np.asarray(values, np.int64))

    def _constant(self, array: Array) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def session(self) -> Any:
        """A session of the graph on one thread."""
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "form", self.inputs, results, list(self._constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level, options.enable_mem_pattern = 1, 3, False
        return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_turns(runs: Mapping[str, Callable[[], Array]], rounds: int) -> dict[str, dict[str, float]]:
    """Form -> the least seconds of the processor that it took, and its largest difference to the first form."""
    wanted, *_ = (run() for run in runs.values())
    rows = {name: {"seconds": float("inf"), "error": 0.0} for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            got = run()
            took = time.process_time() - began
            error = float(np.abs(got - wanted).max())
            rows[name] = {"seconds": min(rows[name]["seconds"], took), "error": max(rows[name]["error"], error)}
    return rows
