"""Measure what streamed windows of speech cost the DiT, with keys and values kept between them and without.

    python -m benchmarks.dit_windows BUNDLE... [--compare BUNDLE...] [--codes 108] [--solver faster] [--rounds 3]

Writes docs/results/dit_windows.json and dit_windows.md. Each BUNDLE speaks the same random codes over the same noise in
ONNX Runtime on the CPU: with what each window leaves to the next, and as before, with 24 codes solved again. Both ways
take turns in one process, in one thread; a window's time is the processor's for all its evaluations, the least of all
rounds. The mel of bundles to compare, in float32, is held against that of the whole utterance, solved by rk4.
"""

from __future__ import annotations

import argparse
import copy
import math
import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import (
    Array,
    Backend,
    BackendWrapper,
    Graph,
    GraphWrapper,
    KvCache,
    Outputs,
    RunHandle,
)
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.backends.onnxruntime.packages import import_onnxruntime
from omniport.runtime.bundle.manifest import DitGeometry
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.kept_blocks import kept_bytes, nothing_before
from omniport.runtime.speech.ode import with_method
from omniport.runtime.speech.ode_methods import METHODS, Solver
from omniport.runtime.speech.token2wav import MelPiece, NoiseStream, Token2Wav
from omniport.runtime.speech.windows import SpeechWindows, Window, window_codes
from omniport.runtime.system.host import cpu_name

from benchmarks.harness import command_line, record, table

#: new codes of a window whose cost is stated
NEW = SpeechWindows().chunks[-1]
#: asked for: times less time
LEAST_GAIN = 1.3
WAYS = ("kept", "again")
#: codes of an utterance whose mel is compared
_COMPARED = 4 * NEW + 12


class _Again(GraphWrapper):
    """A DiT that is given nothing of the window before."""

    def __init__(self, inner: Graph, nothing: Mapping[str, Array]) -> None:
        super().__init__(inner)
        self._nothing = nothing

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        return super().run({**self._nothing, **feeds}, cache, handle)


class _AgainBackend(BackendWrapper):
    def __init__(self, inner: Backend, dit: DitGeometry) -> None:
        super().__init__(inner)
        self._nothing = nothing_before(dit)

    def graph(self, name: str) -> Graph:
        graph = super().graph(name)
        return _Again(graph, self._nothing) if name == "dit" else graph


class Speech:
    """One utterance of a bundle, made in both ways."""

    def __init__(self, root: str, codes: int) -> None:
        self.bundle = Bundle.open(root)
        dit = self.bundle.manifest.dit
        if dit is None or not dit.past_layers:
            raise SystemExit(f"{root} keeps nothing between windows: export it again, with this release")
        self.dit, rng = dit, np.random.default_rng(0)
        self.codes = rng.integers(0, dit.num_embeds, codes).tolist()
        self.noise = rng.standard_normal((codes * dit.repeats, dit.mel_dim), np.float32)
        before = copy.copy(self.bundle)
        geometry = msgspec.structs.replace(dit, past_layers=())
        before.manifest = msgspec.structs.replace(self.bundle.manifest, dit=geometry)
        backend = OrtBackend(self.bundle, threads=1)
        self._ways: dict[str, tuple[Bundle, Backend]] = {
            "kept": (self.bundle, backend),
            "again": (before, _AgainBackend(backend, dit)),
        }

    def mel(self, way: str, window: Window, solver: Solver) -> tuple[NDArray[np.float32], list[float]]:
        """The mel [frames, 80], and the processor's seconds for each window."""
        bundle, backend = self._ways[way]
        noise = NoiseStream(self.noise, np.random.default_rng(0), self.dit.mel_dim)
        made = Token2Wav(backend, bundle, bundle.voice(), noise, window=window, solver=solver)
        pieces: list[MelPiece] = []
        seconds: list[float] = []
        for code in (*self.codes, None):
            started = time.process_time()
            found = made.last_mels() if code is None else made.mels(code)
            if found:
                pieces += found
                seconds.append(time.process_time() - started)
        return np.concatenate([piece.mel[piece.skip : piece.skip + piece.count] for piece in pieces]), seconds


def measure(options: argparse.Namespace, _: object) -> Iterator[dict[str, Any]]:
    """Everything that the page shows, after each bundle."""
    result: dict[str, Any] = {
        "onnxruntime": import_onnxruntime().__version__,
        "processor": cpu_name(),
        "solver": options.solver,
        "rounds": options.rounds,
        "bundles": [],
        "compared": [],
    }
    for root in options.compare:
        result["compared"].append(_compare_bundle(Speech(root, _COMPARED)))
    for root in options.bundles:
        result["bundles"].append(_measure_bundle(Speech(root, options.codes), options))
        yield result


def _measure_bundle(speech: Speech, options: argparse.Namespace) -> dict[str, Any]:
    manifest = speech.bundle.manifest
    best = dict.fromkeys(WAYS, math.inf)
    for _ in range(options.rounds):
        for way in WAYS:
            _, seconds = speech.mel(way, SpeechWindows((NEW,)), options.solver)
            # the first window has nothing before it, and the last another length
            best[way] = min(best[way], *seconds[1:-1])
    assert manifest.solver is not None
    evaluations = {str(name): sum(map(len, with_method(manifest.solver, name).stages)) for name in METHODS}
    work = {
        "kept": window_codes(NEW, speech.dit),
        "again": window_codes(NEW, msgspec.structs.replace(speech.dit, past_layers=())),
    }
    return {
        "name": manifest.source.name,
        "precision": manifest.graphs["dit"].precision,
        "codes": work,
        "seconds": {way: value * speech.dit.codec_hz / NEW for way, value in best.items()},
        "gain": best["again"] / best["kept"],
        "bytes": {name: kept_bytes(speech.dit, count) for name, count in evaluations.items()},
    }


def _compare_bundle(speech: Speech) -> dict[str, Any]:
    """Of streamed mels from the whole one, over its standard deviation: RMS, and the largest value of a block."""
    whole, _ = speech.mel("kept", "whole", "rk4")
    scale = float(whole.std())
    if scale < 1e-2:
        raise SystemExit("the mel is flat: nothing can be compared")
    found: dict[str, Any] = {"name": speech.bundle.manifest.source.name}
    for way in WAYS:
        streamed, _ = speech.mel(way, SpeechWindows((NEW,)), "rk4")
        off = np.abs(streamed - whole) / scale
        frames = len(off) // speech.dit.block_size * speech.dit.block_size
        blocks = off[:frames].reshape(-1, speech.dit.block_size, off.shape[1]).max(axis=(1, 2))
        size = NEW // speech.dit.block_codes
        seams = np.arange(size - 1, len(blocks), size)
        inside = np.setdiff1d(np.arange(len(blocks)), seams)
        found[way] = {
            "rms": float(np.sqrt(np.mean(np.square(off)))),
            "inside": float(blocks[inside].max()),
            "last": float(blocks[seams].max()),
        }
    return found


def page(result: Any) -> str:
    """docs/results/dit_windows.md."""
    rows = [
        [
            f"{one['name']}, {one['precision']}",
            f"{one['codes']['again']}/{NEW}",
            f"{one['codes']['kept']}/{NEW}",
            f"{one['seconds']['again']:.2f}",
            f"{one['seconds']['kept']:.2f}",
            f"**{one['gain']:.2f}**",
        ]
        for one in result["bundles"]
    ]
    differences = [
        [f"{one['name']}, {way}", *(f"{one[way][what]:.1e}" for what in ("rms", "inside", "last"))]
        for one in result["compared"]
        for way in WAYS
    ]
    last = result["bundles"][-1]
    held = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in last["bytes"].items())
    head = ["bundle", "codes, again", "codes, kept", "s for 1 s of speech, again", "kept", "times less"]
    lines = [
        "# Windows of the DiT",
        "",
        *_paragraph(
            """Made by `python -m benchmarks.dit_windows`. Streamed speech is solved in windows. *Kept*: keys and values
            of the last block of a window are inputs of the next ([decision](../decisions/kept-blocks.md)). *Again*: 24
            codes before each window are solved again, as bundles before schema version 3 have it. Random weights;
            `dit3b` is `tiny` with the DiT of the published sizes, 22 layers of width 1024."""
        ),
        *_paragraph(
            f"""ONNX Runtime {result["onnxruntime"]}, one thread of {result["processor"]}, shared with other programs:
            processor time; solver `{result["solver"]}`, best of {result["rounds"]} rounds, both ways in turns.
            The DiT of windows of {NEW} new codes; asked were at most 60/48 codes, and {LEAST_GAIN} times less time."""
        ),
        *table(head, rows),
        "",
        *_paragraph(
            """Distance of the streamed mel from the whole one (`rk4`, same noise), over its standard deviation. The
            last block of a window differs because the look-ahead block has no look-ahead of its own, and what is kept
            of it reaches the block after it."""
        ),
        *table(["mel", "RMS", "largest but for last blocks", "largest in a window's last block"], differences),
        "",
        *_paragraph(f"A reply holds, in MB by solver ({last['name']}): {held}."),
    ]
    return "\n".join(lines)


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 118), ""]


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE")
    parser.add_argument("--compare", nargs="*", default=[], metavar="BUNDLE", help="in float32")
    parser.add_argument("--codes", type=int, default=2 * NEW + 12)
    parser.add_argument("--solver", default="faster", choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    record("dit_windows", page, measure, parser)


if __name__ == "__main__":
    main()
