"""Measure forms of the KV cache and attention of a decoder layer; writes docs/results/kv-forms.json and its page.

    python -m benchmarks.kv_forms [--rounds 30]

Graphs of nothing but the cache and attention of four layers, with the talker's sizes, on one thread of ONNX Runtime.
All forms of a case take turns, and seconds are those of the processor, which other programs disturb little.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.system.host import cpu_name
from onnx import TensorProto

from benchmarks.form_runs import Array, GraphMaker, in_turns
from benchmarks.harness import command_line, record, table

HEADS, KV_HEADS, WIDTH, CAPACITY, LAYERS = 14, 2, 64, 8192, 4
GROUP = HEADS // KV_HEADS
SCALE = WIDTH**-0.5
#: new tokens, tokens in the cache after them
CASES = ((1, 1024), (1, 4096), (256, 256), (1024, 1024))


class _Form:
    """How a layer reads its cache, and how queries meet it.

    Args:
        reads: "slice" cuts the live part out, "mask" reads the capacity under a mask, "length" reads it and gives
            Attention its live length, "exact" binds a cache of the live length for each head.
        rows: query heads that share a head of keys are rows of one head.
        products: MatMul and Softmax instead of Attention.
    """

    def __init__(self, reads: str, rows: bool = False, products: bool = False) -> None:
        self.reads, self.rows, self.products = reads, rows, products

    def run(self, new: int, live: int) -> Callable[[], Array]:
        """A function that runs four layers: queries [1, 14, new, 64] -> [1, 14, new, 64]."""
        graph = GraphMaker()
        span = "capacity" if self.reads == "mask" else "live"
        mask = graph.input("mask", 1, 1, "new", span, kind=TensorProto.BOOL) if self.reads != "length" else ""
        graph.input("write_index", 1, kind=TensorProto.INT64)
        if self.reads in ("slice", "length"):
            graph.input("live_length", 1, kind=TensorProto.INT64)
        x, update = graph.input("x", 1, HEADS, "new", WIDTH), graph.input("update", 1, KV_HEADS, "new", WIDTH)
        if self.rows:
            mask = graph("Concat", *[mask] * GROUP, axis=2)
        for layer in range(LAYERS):
            keys, values = (self._cache(graph, f"{part}_{layer}", update) for part in ("key", "value"))
            x = self._attend(graph, x, keys, values, mask)
        graph.outputs.append(x)
        session = graph.session()
        binding = session.io_binding()
        for name, feed in _feeds(new, live, CAPACITY if self.reads == "mask" else live).items():
            if name in (found.name for found in graph.inputs):
                binding.bind_ortvalue_input(name, _placed(feed))
        for name in graph.outputs[:-1]:
            cache = _placed(self._past(name, live))
            binding.bind_ortvalue_input(name.replace("present", "past"), cache)
            binding.bind_ortvalue_output(name, cache)
        binding.bind_output(x, "cpu")
        return partial(_run, session, binding)

    def _past(self, name: str, live: int) -> Array:
        """What a cache holds before: the same in all forms."""
        _, part, layer, head = name.split("_")
        rng = np.random.default_rng(2 * int(layer) + (part == "key"))
        whole = rng.standard_normal((1, KV_HEADS, CAPACITY, WIDTH), np.float32)
        return whole[:, int(head) :][:, :1, :live] if self.reads == "exact" else whole

    def _cache(self, graph: GraphMaker, name: str, update: str) -> list[str]:
        """What is read of a cache: all heads, or one name for each."""
        parts = KV_HEADS if self.reads == "exact" else 1
        found = []
        for part in range(parts):
            past = graph.input(f"past_{name}_{part}", 1, KV_HEADS // parts, "capacity", WIDTH)
            rows = _heads(graph, update, part, 1) if parts > 1 else update
            present = f"present_{name}_{part}"
            graph("TensorScatter", past, rows, "write_index", output=present, axis=-2, mode="linear")
            graph.outputs.append(present)
            if self.reads == "slice":
                present = graph("Slice", present, graph.integers(0), "live_length", graph.integers(2))
            found.append(present)
        return found

    def _attend(self, graph: GraphMaker, x: str, keys: list[str], values: list[str], mask: str) -> str:
        parts = len(keys)
        found = []
        for part, (key, value) in enumerate(zip(keys, values, strict=True)):
            q = _heads(graph, x, part * GROUP, GROUP) if parts > 1 else x
            if self.rows:
                q = graph("Reshape", q, graph.integers(0, KV_HEADS // parts, -1, WIDTH))
            y = self._product(graph, q, key, value, mask)
            if self.rows:
                y = graph("Reshape", y, graph.integers(0, HEADS // parts, -1, WIDTH))
            found.append(y)
        return graph("Concat", *found, axis=1) if parts > 1 else found[0]

    def _product(self, graph: GraphMaker, q: str, key: str, value: str, mask: str) -> str:
        if not self.products:
            rest = ("", "", "", "live_length") if self.reads == "length" else (mask,)
            return graph("Attention", q, key, value, *rest, scale=SCALE)
        turned = graph("Transpose", key, perm=[0, 1, 3, 2])
        scores = graph("MatMul", graph("Mul", q, graph.floats(SCALE)), turned)
        scores = graph("Where", mask, scores, graph.floats(-1e30))
        return graph("MatMul", graph("Softmax", scores, axis=-1), value)


def _heads(graph: GraphMaker, x: str, first: int, count: int) -> str:
    return graph("Slice", x, graph.integers(first), graph.integers(first + count), graph.integers(1))


def _feeds(new: int, live: int, span: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    rows = np.arange(live - new, live)
    return {
        "x": rng.standard_normal((1, HEADS, new, WIDTH), np.float32),
        "update": rng.standard_normal((1, KV_HEADS, new, WIDTH), np.float32),
        "mask": (np.arange(span) <= rows[:, None])[None, None],
        "write_index": np.asarray([live - new]),
        "live_length": np.asarray([live]),
    }


def _placed(array: Array) -> Any:
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _run(session: Any, binding: Any) -> Array:
    session.run_with_iobinding(binding)
    return np.asarray(binding.get_outputs()[-1].numpy())


FORMS = {
    "Slice, Attention with 14 heads": _Form("slice"),
    "no Slice, all of the capacity masked": _Form("mask"),
    "no Slice, `nonpad_kv_seqlen`": _Form("length"),
    "a cache for each head, bound at its live length, no Slice": _Form("exact"),
    "the same, 7 query heads as rows of one": _Form("exact", rows=True),
    "Slice, 7 query heads as rows of one: Attention with 2 heads": _Form("slice", rows=True),
    "the same as MatMul, Softmax, MatMul": _Form("slice", rows=True, products=True),
}


def measure(options: argparse.Namespace, found: Any) -> Iterator[dict[str, Any]]:
    """Everything that the page shows, after each case."""
    cases: list[dict[str, Any]] = []
    result = {
        "version": import_onnxruntime().__version__,
        "processor": cpu_name(),
        "rounds": options.rounds,
        "cases": cases,
    }
    for new, live in CASES:
        # Whole caches are for steps: the cost of what they read in vain grows with the new tokens.
        forms = {name: form for name, form in FORMS.items() if new == 1 or form.reads == "slice"}
        runs = {name: form.run(new, live) for name, form in forms.items()}
        rows = in_turns(runs, options.rounds if new == 1 else max(1, options.rounds // 4))
        cases.append({"new": new, "live": live, "forms": rows})
        yield result


def page(found: dict[str, Any]) -> str:
    """docs/results/kv-forms.md."""
    about = (
        f"ONNX Runtime {found['version']} on one thread of {found['processor']}, in turns in one process: the least "
        f"microseconds of the processor of {found['rounds']} rounds for one layer's cache and attention, a quarter of "
        f"the rounds where there are more new tokens than one. {HEADS} query heads, {KV_HEADS} of keys, {WIDTH} wide; "
        f"the capacity is {CAPACITY:,}. Error: the largest difference to the first form's result."
    )
    lines = [
        "# Forms of the KV cache and attention",
        "",
        "Made by `python -m benchmarks.kv_forms` from kv-forms.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
    ]
    for case in found["cases"]:
        base = next(iter(case["forms"].values()))["seconds"]
        rows = [
            (name, f"{1e6 * row['seconds'] / LAYERS:,.0f}", f"{base / row['seconds']:.2f}", f"{row['error']:.0e}")
            for name, row in case["forms"].items()
        ]
        head = ("form", "us", "times as fast", "error")
        lines += ["", f"New tokens: {case['new']:,}; in the cache with them: {case['live']:,}.", "", *table(head, rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, and measure."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    record("kv-forms", page, measure, parser)


if __name__ == "__main__":
    main()
