"""Measure the vocoder's convolutions as products of short spectra, beside ONNX Runtime's own.

    python scripts/measure_spectral.py [--frames 82] [--json F]

A convolution over time of kernel k becomes, in blocks of N values of which N - k + 1 are results, a real Fourier
transform, one product over the channels for each bin, and the transform back. A complex product takes three real ones,
so that a block of N costs about 3/2 N products of channels by channels where the convolution takes k (N - k + 1). Both
transforms are matrix products too. It is what was tried to make the vocoder quicker on a CPU; docs/results/bench.md
says what came of it, and why the graphs do not have it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.backend import physical_cores
from onnx import ModelProto, TensorProto, helper, numpy_helper

#: channels and steps a mel frame of BigVGAN's stages; the last, of 24 channels, has nothing to gain
STAGES = ((768, 5), (384, 15), (192, 30), (96, 60), (48, 120))
KERNELS = ((3, 1), (3, 5), (7, 1), (7, 3), (11, 1), (11, 5))
BLOCKS = {3: (8,), 7: (16, 32), 11: (32,)}
OPSET = 18

Array = NDArray[Any]


def spectral_matrices(block: int, kernel: int) -> tuple[Array, Array, Array]:
    """A [R, N], G [R, k] and B [M, R] for N values and k taps, M = N - k + 1.

    y = B ((G w) * (A x)), where y[m] is the sum over j of w[j] x[m + j].
    """
    count = block - kernel + 1
    forward, weights, back = [], [], []
    for bin_ in range(block // 2 + 1):
        angle = 2 * np.pi * bin_ / block
        cos, sin = np.cos(angle * np.arange(block)), -np.sin(angle * np.arange(block))
        w_cos, w_sin = np.cos(angle * np.arange(kernel)), np.sin(angle * np.arange(kernel))
        out_cos, out_sin = np.cos(angle * np.arange(count)) / block, np.sin(angle * np.arange(count)) / block
        if bin_ in (0, block / 2):
            forward.append(cos)
            weights.append(w_cos)
            back.append(out_cos)
            continue
        # (a + bi)(c + di) by Gauss: c (a + b), a (d - c), b (c + d)
        forward += [cos + sin, cos, sin]
        weights += [w_cos, w_sin - w_cos, w_cos + w_sin]
        back += [2 * (out_cos - out_sin), -2 * out_sin, -2 * out_cos]
    return np.array(forward), np.array(weights), np.array(back).T


def spectral_model(weight: Array, dilation: int, block: int, steps: int) -> ModelProto:
    """x [1, C, steps] -> y: a padded convolution of ``weight`` [C, C, k] without bias, by its spectrum."""
    channels, _, kernel = weight.shape
    a, g, b = spectral_matrices(block, kernel)
    rank, hop = len(a), block - kernel + 1
    left = (kernel - 1) * dilation // 2
    blocks = -(-steps // (hop * dilation))
    length = (blocks + 1) * hop  # of each of the phases that a dilation makes
    graph = _Graph()
    graph.add("Pad", "x", graph.integers(0, 0, left, 0, 0, length * dilation - left - steps))
    if dilation > 1:
        graph.add("Reshape", graph.last, graph.integers(channels, length, dilation))
        graph.add("Transpose", graph.last, perm=[0, 2, 1])
    graph.add("Reshape", graph.last, graph.integers(channels * dilation, blocks + 1, hop))
    graph.add("Transpose", graph.last, perm=[2, 0, 1])
    frames = graph.last
    graph.add("Slice", frames, graph.integers(0), graph.integers(blocks), graph.integers(2))
    heads = graph.last
    graph.add("Slice", frames, graph.integers(0, 1), graph.integers(kernel - 1, blocks + 1), graph.integers(0, 2))
    graph.add("Concat", heads, graph.last, axis=0)
    columns = channels * dilation * blocks
    graph.add("Reshape", graph.last, graph.integers(block, columns))
    graph.add("MatMul", graph.floats(a), graph.last)
    graph.add("Reshape", graph.last, graph.integers(rank, channels, dilation * blocks))
    graph.add("MatMul", graph.floats(np.einsum("rk,oik->roi", g, weight)), graph.last)
    graph.add("Reshape", graph.last, graph.integers(rank, columns))
    graph.add("MatMul", graph.floats(b), graph.last)
    graph.add("Reshape", graph.last, graph.integers(hop, channels, dilation, blocks))
    graph.add("Transpose", graph.last, perm=[1, 3, 0, 2])
    graph.add("Reshape", graph.last, graph.integers(1, channels, blocks * hop * dilation))
    graph.add("Slice", graph.last, graph.integers(0), graph.integers(steps), graph.integers(2))
    return graph.model(channels)


class _Graph:
    """Nodes one after the other; ``last`` is what the newest gives."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[TensorProto] = []
        self.last = "x"

    def add(self, kind: str, *inputs: str, **attributes: Any) -> None:
        self.last = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [self.last], **attributes))

    def integers(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def floats(self, values: Array) -> str:
        return self._constant(values.astype(np.float32))

    def _constant(self, values: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def model(self, channels: int) -> ModelProto:
        start, end = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, None]) for name in ("x", self.last)
        )
        graph = helper.make_graph(self.nodes, "convolution", [start], [end], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def _plain_model(weight: Array, dilation: int) -> ModelProto:
    graph, kernel = _Graph(), weight.shape[2]
    pads = [(kernel - 1) * dilation // 2] * 2
    graph.add("Conv", "x", graph.floats(weight), pads=pads, dilations=[dilation], kernel_shape=[kernel])
    return graph.model(weight.shape[0])


def _runner(model: ModelProto, x: Array) -> Callable[[], Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: np.asarray(session.run(None, {"x": x})[0])


def _alternate(runs: list[Callable[[], Array]], rounds: int) -> list[float]:
    """The quickest of each, in turns."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for index, run in enumerate(runs):
            begun = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - begun)
    return best


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convolutions of the vocoder as products of spectra.")
    parser.add_argument("--frames", type=int, default=82, help="mel frames: a window of 24 and its context")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    draw, rows, before, after = np.random.default_rng(0), [], 0.0, 0.0
    for channels, up in STAGES:
        steps = options.frames * up
        x = draw.standard_normal((1, channels, steps), np.float32)
        for kernel, dilation in KERNELS:
            weight = draw.standard_normal((channels, channels, kernel), np.float32) / np.sqrt(channels * kernel)
            runs = [_runner(_plain_model(weight, dilation), x)]
            runs += [_runner(spectral_model(weight, dilation, block, steps), x) for block in BLOCKS[kernel]]
            wanted, *found = [run() for run in runs]
            seconds = _alternate(runs, 5)
            before, after = before + seconds[0], after + min(seconds)
            for block, one, got in zip(BLOCKS[kernel], seconds[1:], found, strict=True):
                error = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
                row = {"channels": channels, "kernel": kernel, "dilation": dilation, "block": block}
                rows.append(row | {"conv_ms": 1e3 * seconds[0], "times_as_fast": seconds[0] / one, "error": error})
                print(
                    f"{channels} channels, kernel {kernel}, dilation {dilation}: {1e3 * seconds[0]:.1f} ms; blocks of "
                    f"{block}: {seconds[0] / one:.2f} times as fast, error {error:.0e}",
                    flush=True,
                )
    print(f"with the quicker form everywhere: {after / before:.2f} of the time")
    if options.json is not None:
        options.json.write_text(json.dumps({"frames": options.frames, "rows": rows, "share": after / before}, indent=1))


if __name__ == "__main__":
    main()
