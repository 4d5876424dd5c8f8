"""Measure a vocoder beside quantized ones: loss, speed, and where the time goes; writes docs/results/vocoder.md.

    python -m benchmarks.vocoder BUNDLE NAME=QUANTIZED ... [--frames 116,250] [--rounds 6] [--name small]
    python -m benchmarks.vocoder --page

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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import physical_cores

from benchmarks.harness import RESULTS
from benchmarks.quant import processor
from benchmarks.speech_loss import Voice, sqnr

#: runs that are profiled
_PROFILED = 3
#: operators that the page names
_NAMED = 10


def measure(roots: dict[str, Path], frames: list[int], rounds: int) -> dict[str, Any]:
    """Everything that the page shows; the first bundle is the one that the others are compared with."""
    import onnxruntime

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
            found[name]["sqnr"] = sqnr(voice.wave(mel), wanted)
    for count in frames:
        for name, seconds in _times(voices, mel[:, :count], rounds).items():
            found[name]["seconds"][str(count)] = seconds
    del voices, first
    for name, root in roots.items():
        found[name] |= _operators(root, threads, mel[:, : frames[0]])
    return {
        "bundle": Bundle.open(roots[base]).manifest.source.name,
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "processor": processor(),
        "rounds": rounds,
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
    lines = [
        "# The vocoder in INT8",
        "",
        "Made by `python -m benchmarks.vocoder` from vocoder.json: do not edit by hand.",
        "",
        *textwrap.wrap(about, 118),
        "",
        "| vocoder | "
        + " | ".join(f"{count} frames, ms | times as fast" for count in frames)
        + " | samples SQNR, dB |",
        "|---|" + "---|---|" * len(frames) + "---|",
    ]
    for name, row in vocoders.items():
        cells = []
        for count in frames:
            seconds, reference = row["seconds"][count], vocoders[base]["seconds"][count]
            cells += [f"{1e3 * seconds:,.0f}", f"{reference / seconds:.2f}"]
        loss = f"{row['sqnr']:.1f}" if name in others else "-"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {loss} |")
    return "\n".join([*lines, "", *_shares(found, frames[0])]) + "\n"


def _shares(found: dict[str, Any], frames: str) -> list[str]:
    vocoders = found["vocoders"]
    named = Counter[str]()
    for row in vocoders.values():
        named |= Counter(row["milliseconds"])
    lines = [
        f"Milliseconds by operator, {frames} frames, in ONNX Runtime's profile: number of nodes in brackets.",
        "",
        "| operator | " + " | ".join(vocoders) + " |",
        "|---|" + "---|" * len(vocoders),
    ]
    for kind, _ in named.most_common(_NAMED):
        cells = [f"{r['milliseconds'].get(kind, 0):,.0f} ({r['nodes'].get(kind, 0)})" for r in vocoders.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    whole = " | ".join(f"{sum(row['milliseconds'].values()):,.0f}" for row in vocoders.values())
    return [*lines, f"| all | {whole} |"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a vocoder beside quantized ones.")
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("quantized", nargs="*", metavar="NAME=QUANTIZED")
    parser.add_argument("--frames", default="116,250")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--name", help="what the page calls the checkpoint; the bundle's name for it otherwise")
    parser.add_argument("--page", action="store_true", help="only write the page from vocoder.json")
    options = parser.parse_args()
    place = RESULTS / "vocoder.json"
    if not options.page:
        if options.bundle is None or not all("=" in pair for pair in options.quantized):
            parser.error("give BUNDLE and NAME=QUANTIZED, or --page")
        pairs = (pair.partition("=") for pair in options.quantized)
        roots = {"FP32": options.bundle} | {name: Path(root) for name, _, root in pairs}
        found = measure(roots, [int(count) for count in options.frames.split(",")], options.rounds)
        found["bundle"] = options.name or found["bundle"]
        place.write_text(json.dumps(found, indent=1) + "\n")
    place.with_suffix(".md").write_text(page(json.loads(place.read_text())))


if __name__ == "__main__":
    main()
