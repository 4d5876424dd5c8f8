"""Measure a vocoder beside quantized ones: loss, speed, and where the time goes; writes docs/results/vocoder.md.

    python -m benchmarks.vocoder BUNDLE NAME=QUANTIZED ... [--frames 116,250] [--rounds 6] [--name small]

One process measures everything, in turns, one vocoder after the other; times are the best of all rounds. The mel is
the one that BUNDLE's DiT makes of random codes with a fixed seed, loss the SQNR of the samples against BUNDLE's.
Operators are counted on the graph that ONNX Runtime made, and their time is the sum over its nodes, each at its best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation.speech_metrics import snr_db
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import cpu_name, physical_cores

from benchmarks.harness import command_line, record, table
from benchmarks.speech_loss import Voice

#: runs that are profiled
_PROFILED = 3
#: operators that the page names
_NAMED = 10


def measure(options: argparse.Namespace, _: object) -> Iterator[dict[str, Any]]:
    """Everything that the page shows; the first bundle is the one that the others are compared with."""
    roots = {"FP32": options.bundle} | {name: Path(root) for name, root in options.quantized}
    frames = [int(count) for count in options.frames.split(",")]
    threads, base = physical_cores(), next(iter(roots))
    first = Voice(roots[base], threads)
    dit = first.bundle.manifest.dit
    assert dit is not None
    codes = np.random.default_rng(0).integers(0, dit.num_embeds, -(-max(frames) // 2)).tolist()
    mel = first.mel(codes)
    voices = {name: first if name == base else Voice(root, threads) for name, root in roots.items()}
    wanted = first.wave(mel)
    found: dict[str, Any] = {name: {"seconds": {}} for name in voices}
    for name, voice in voices.items():
        if name != base:
            found[name]["sqnr"] = snr_db(voice.wave(mel), wanted)
    for count in frames:
        for name, seconds in _times(voices, mel[:, :count], options.rounds).items():
            found[name]["seconds"][str(count)] = seconds
    del voices, first
    for name, root in roots.items():
        found[name] |= _operators(root, threads, mel[:, : frames[0]])
    yield {
        "bundle": options.name or Bundle.open(roots[base]).manifest.source.name,
        "onnxruntime": import_onnxruntime().__version__,
        "threads": threads,
        "processor": cpu_name(),
        "rounds": options.rounds,
        "rms": float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64)))),
        "vocoders": found,
    }


def _times(voices: dict[str, Voice], mel: NDArray[np.float32], rounds: int) -> dict[str, float]:
    """Seconds of the fastest run of each, in turns."""
    best: dict[str, float] = dict.fromkeys(voices, float("inf"))
    for _ in range(rounds):
        for name, voice in voices.items():
            begun = time.perf_counter()
            voice.wave(mel)
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


def _operators(root: Path, threads: int, mel: NDArray[np.float32]) -> dict[str, Any]:
    """Milliseconds and number of nodes by operator, filters of activations apart from other convolutions."""
    with tempfile.TemporaryDirectory() as folder:
        graph = OrtBackend(Bundle.open(root), threads=threads, profiles=Path(folder)).graph("bigvgan")
        for _ in range(_PROFILED):
            graph.run({"mel": mel[None]})
        events = json.loads(graph.end_profile().read_text())
    best: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"]
            best[name] = min(best.get(name, event["dur"]), event["dur"])
            kinds[name] = _kind(name, event["args"]["op_name"])
    total: dict[str, float] = defaultdict(float)
    for name, microseconds in best.items():
        total[kinds[name]] += microseconds / 1e3
    return {"milliseconds": dict(sorted(total.items(), key=lambda pair: -pair[1])), "nodes": Counter(kinds.values())}


def _kind(name: str, operator: str) -> str:
    return f"{operator}, filters" if operator == "Conv" and "activation" in name else operator


def page(found: dict[str, Any]) -> str:
    """docs/results/vocoder.md."""
    vocoders, (base, *others) = found["vocoders"], found["vocoders"]
    frames = list(vocoders[base]["seconds"])
    about = (
        f"Random-weight checkpoint `{found['bundle']}`, ONNX Runtime {found['onnxruntime']} on {found['threads']} "
        f"threads of {found['processor']}. All in one process, in turns; the best of {found['rounds']} rounds. The "
        f"samples that SQNR is measured against have an RMS of {found['rms']:.3f}."
    )
    rows = []
    for name, row in vocoders.items():
        times = [(row["seconds"][count], vocoders[base]["seconds"][count]) for count in frames]
        cells = [cell for ours, first in times for cell in (f"{1e3 * ours:,.0f}", f"{first / ours:.2f}")]
        rows.append((name, *cells, f"{row['sqnr']:.1f}" if name in others else "-"))
    columns = [title for count in frames for title in (f"{count} frames, ms", "times as fast")]
    lines = [
        "# The vocoder in INT8",
        "",
        "Made by `python -m benchmarks.vocoder` from vocoder.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
        "",
        *table(("vocoder", *columns, "samples SQNR, dB"), rows),
        "",
        *_shares(found, frames[0]),
    ]
    return "\n".join(lines) + "\n"


def _shares(found: dict[str, Any], frames: str) -> list[str]:
    vocoders = found["vocoders"]
    named = Counter[str]()
    for row in vocoders.values():
        named |= Counter(row["milliseconds"])
    rows: list[tuple[str, ...]] = [
        (kind, *(f"{r['milliseconds'].get(kind, 0):,.0f} ({r['nodes'].get(kind, 0)})" for r in vocoders.values()))
        for kind, _ in named.most_common(_NAMED)
    ]
    rows.append(("all", *(f"{sum(row['milliseconds'].values()):,.0f}" for row in vocoders.values())))
    return [
        f"Milliseconds by operator, {frames} frames, in ONNX Runtime's profile: number of nodes in brackets.",
        "",
        *table(("operator", *vocoders), rows),
    ]


def _named(text: str) -> tuple[str, str]:
    name, equals, root = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("NAME=QUANTIZED was expected")
    return name, root


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("quantized", nargs="*", type=_named, metavar="NAME=QUANTIZED")
    parser.add_argument("--frames", default="116,250")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--name", help="what the page calls the checkpoint; the bundle's name for it otherwise")
    record("vocoder", page, measure, parser)


if __name__ == "__main__":
    main()
