"""Settings of ONNX Runtime, and other cuts of the same work, beside what the runtime does, for what bench.md says.

    python scripts/measure_options.py BUNDLE [--stages prefill,audio_encoder,dit,bigvgan] [--rounds 5]

Prints how many times as fast each variant is as the graph the way the runtime runs it, largest input of the stage, in
turns, as the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from omniport.runtime.backends.onnxruntime.backend import OrtBackend, physical_cores
from omniport.runtime.bench.workloads import GRAPH_OF, Sizes, stage_jobs
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.generation import thinker
from onnx import TensorProto, helper, numpy_helper

#: variant -> entries of the session's configuration
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "work in blocks, base 1": {"session.dynamic_block_base": "1"},
    "work in blocks, base 4": {"session.dynamic_block_base": "4"},
    "work in blocks, base 16": {"session.dynamic_block_base": "16"},
    "threads that do not spin": {"session.intra_op.allow_spinning": "0"},
    "weights not packed": {"session.disable_prepacking": "1"},
}
#: of these, ONNX Runtime runs nodes at once
PARALLEL = {"nodes at once": 2, "nodes at once, a thread each": 1}
#: chunks of sound in one run
BATCHES = (3, 5, 8)
#: rows, inputs, outputs of products over the same rows
PRODUCTS = {
    "audio encoder, queries, keys and values": (1500, 1280, (1280, 1280, 1280)),
    "thinker, queries, keys and values": (512, 2048, (2048, 256, 256)),
    "thinker, gate and up": (512, 2048, (11008, 11008)),
}


@contextmanager
def _configured(entries: Mapping[str, str], parallel: int = 0) -> Iterator[None]:
    """Sessions that are made meanwhile have these entries."""
    plain = ort.SessionOptions

    def options() -> Any:
        made = plain()
        for key, value in entries.items():
            made.add_session_config_entry(key, value)
        return made

    def session(path: str, sess_options: Any, **given: Any) -> Any:
        if parallel:
            sess_options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
            sess_options.inter_op_num_threads, sess_options.intra_op_num_threads = 2, parallel
        return real(path, sess_options, **given)

    real = ort.InferenceSession
    with mock.patch.object(ort, "SessionOptions", options), mock.patch.object(ort, "InferenceSession", session):
        yield


def _run_of(bundle: Bundle, stage: str, entries: Mapping[str, str], parallel: int = 0) -> Callable[[], object]:
    """The stage's largest input on a backend of its own, which is loaded by the first call."""
    with _configured(entries, parallel):
        backend = OrtBackend(bundle, threads=physical_cores())
        backend.graph(GRAPH_OF[stage])
    *_, job = stage_jobs(stage, bundle, backend, Sizes())
    return job.run


def _batched(run: Callable[[], object], count: int) -> Callable[[], object]:
    def batched() -> object:
        with mock.patch.object(thinker, "_AUDIO_CHUNKS", count):
            return run()

    return batched


def _stage(bundle: Bundle, stage: str) -> dict[str, Callable[[], object]]:
    runs = {"": _run_of(bundle, stage, {})}
    # A decoder's weights take gigabytes, once for each session: packed or not was measured with decoding.
    runs |= {
        name: _run_of(bundle, stage, entries)
        for name, entries in SETTINGS.items()
        if stage != "prefill" or "packed" not in name
    }
    if stage in ("bigvgan", "dit"):
        runs |= {name: _run_of(bundle, stage, {}, threads) for name, threads in PARALLEL.items()}
    if stage == "audio_encoder":
        runs |= {f"in runs of {count} chunks": _batched(runs[""], count) for count in BATCHES}
    return runs


def _product(rows: int, inputs: int, outputs: tuple[int, ...]) -> Callable[[], object]:
    draw, nodes, weights, results = np.random.default_rng(0), [], [], []
    for index, count in enumerate(outputs):
        value = draw.standard_normal((inputs, count), np.float32)
        weights.append(numpy_helper.from_array(value, f"w{index}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{index}"], [f"y{index}"]))
        results.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, None))
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, inputs])
    graph = helper.make_graph(nodes, "products", [start], results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = draw.standard_normal((1, rows, inputs), np.float32)
    return lambda: session.run(None, {"x": x})


def _report(title: str, runs: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """Run all in turns; the first is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    base, *others = times
    print(f"{title}: {1e3 * statistics.median(times[base]):.1f} ms", flush=True)
    for name in others:
        ratio = statistics.median(a / b for a, b in zip(times[base], times[name], strict=True))
        print(f"  {name}: {ratio:.2f} times as fast", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What other settings and cuts would give.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--stages", default="prefill,audio_encoder,dit,bigvgan")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    for stage in options.stages.split(","):
        _report(stage, _stage(bundle, stage), options.rounds)
    for title, (rows, inputs, outputs) in PRODUCTS.items():
        apart, as_one = _product(rows, inputs, outputs), _product(rows, inputs, (sum(outputs),))
        _report(title, {"": apart, "as one product": as_one}, 2 * options.rounds)


if __name__ == "__main__":
    main()
