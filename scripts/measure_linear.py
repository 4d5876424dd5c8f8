"""How the encoders' cost grows: sound chunk by chunk, pictures window by window.

    python scripts/measure_linear.py BUNDLE [--rounds 3]

Prints two tables: milliseconds of a run over 2 s chunks, and of a run over pictures, of which a profile of ONNX Runtime
gives what is spent in windowed attention, in full attention, and in everything else, each per 1,000 patches. Sizes are
run in turns, so that a busy minute does not meet one of them alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from omniport.runtime.backends.onnxruntime.backend import physical_cores
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.generation.thinker import audio_batches, vision_batches
from omniport.runtime.media.image import image_input

CHUNKS = (1, 2, 4, 8, 16, 32)
PICTURES = ((448, 448), (896, 448), (896, 896), (1344, 896))


def _session(bundle: Bundle, name: str, profiles: str = "") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    if profiles:
        options.enable_profiling, options.profile_file_prefix = True, profiles
    path = bundle.path(bundle.manifest.graphs[name].file)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _medians(runs: dict[object, Callable[[], object]], rounds: int) -> dict[object, float]:
    """Seconds of each, in turns, after a run to warm up."""
    times: dict[object, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - started)
    return {key: statistics.median(found) for key, found in times.items()}


def audio(bundle: Bundle, rounds: int) -> None:
    """Sound of one chunk to one full batch."""
    spec = bundle.manifest.audio
    session, rng = _session(bundle, "audio_encoder"), np.random.default_rng(0)
    runs: dict[object, Callable[[], object]] = {}
    for count in CHUNKS:
        mel = rng.standard_normal((count, spec.n_mels, spec.chunk_frames)).astype(np.float32)
        (feeds,) = audio_batches(mel, np.full(count, spec.chunk_frames, np.int64))
        runs[count] = lambda feeds=feeds: session.run(None, feeds)  # type: ignore[misc]
    found = _medians(runs, rounds)
    print("| chunks of 2 s | ms | ms a chunk |\n|---|---|---|")
    for count in CHUNKS:
        print(f"| {count} | {1e3 * found[count]:.0f} | {1e3 * found[count] / count:.1f} |")


def vision(bundle: Bundle, rounds: int) -> None:
    """Pictures of whole windows, profiled."""
    rng = np.random.default_rng(0)
    print("\n| picture | patches | ms | windowed attention | full attention | the rest | per 1,000 patches |")
    print("|---|---|---|---|---|---|---|")
    for width, height in PICTURES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = image_input(pixels, bundle.manifest.vision)
        (feeds,) = vision_batches(picture)
        with tempfile.TemporaryDirectory() as folder:
            session = _session(bundle, "vision_encoder", str(Path(folder) / "profile"))
            for _ in range(rounds + 1):
                session.run(None, feeds)
            spent = _spent(json.loads(Path(session.end_profiling()).read_text()))
        patches, total = picture.patches.shape[1], sum(spent.values())
        cells = " | ".join(f"{1e3 * spent[kind] / patches:.1f}" for kind in ("windowed", "full", "rest"))
        print(f"| {width}x{height} | {patches} | {total:.0f} | {cells} | {1e3 * total / patches:.1f} |")


def _spent(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a run by kind: each node's median over all runs but the first, which finds its memory."""
    nodes: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = "rest"
            if event["args"]["op_name"] == "Attention":
                (sequences, *_) = next(iter(event["args"]["input_type_shape"][0].values()))
                kind = "windowed" if sequences > 1 else "full"
            nodes.setdefault((kind, event["name"]), []).append(event["dur"] / 1e3)
    spent = {"windowed": 0.0, "full": 0.0, "rest": 0.0}
    for (kind, _), times in nodes.items():
        spent[kind] += statistics.median(times[1:])
    return spent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure how the encoders' cost grows.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    audio(bundle, options.rounds)
    vision(bundle, options.rounds)


if __name__ == "__main__":
    main()
