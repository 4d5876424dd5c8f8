"""Measure what turns, the first sound's precedence and the windows do to a spoken reply on a CPU.

Usage: python -m benchmarks.pacing BUNDLE [--rounds N] [--solver rk4 ...] [--way NAME ...] [--codes 250] [--json F]

Every way of working answers the same question, in turns, in one process and over the same loaded graphs: all workers at
once, as on a device whose graphs do not share cores; in turns, with the same windows; and in turns with the windows of
a machine that is behind, which is the default on a CPU; others if named (--way). What is said has to be the same, or
nothing is written. Beside the seconds stand those of the processor, of all threads: they grow less when other programs
run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omniport.runtime import AudioChunk, Done, Event, OmniSession, SpeechWindows
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bench.reply_timing import ask
from omniport.runtime.bench.workloads import Sizes
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.speech.ode_methods import METHODS, Solver
from omniport.runtime.speech.windows import Window

from benchmarks.harness import command_line

#: way of working: whether graphs count as sharing cores, and the windows
WAYS: dict[str, tuple[bool, Window]] = {
    "all at once": (False, "stream"),
    "in turns": (True, SpeechWindows()),
    "in turns, longer windows": (True, "stream"),
    "in turns, longer windows, less context": (True, SpeechWindows(vocoder_context=20, behind=240)),
    "in turns, one window": (True, "whole"),
}
_USUAL = tuple(WAYS)[:3]


class _Cores(OrtBackend):
    """ONNX Runtime on the CPU that can be told not to share cores."""

    shared = True

    def at_once(self) -> int | None:
        """One run, or any number."""
        return 1 if self.shared else None


def measure(
    bundle: Path, rounds: int, solvers: list[Solver], codes: int, ways: tuple[str, ...] = _USUAL
) -> list[dict[str, Any]]:
    """A row for each solver and way of working."""
    opened = Bundle.open(bundle)
    backend = _Cores(opened)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with OmniSession(opened, backend) as session:
        for _ in ask(session, Sizes(), "euler", codes=26):  # loads every graph and touches every weight
            pass
        for solver in solvers * rounds:
            for way in ways:
                backend.shared, window = WAYS[way]
                figures = _figures(ask(session, Sizes(), solver, codes, window))
                print(f"{solver}, {way}: {figures['first_sound']:.2f} s, {figures['total']:.1f} s", file=sys.stderr)
                rows.setdefault((solver, way), []).append(figures)
    said = {str(reply["said"]) for replies in rows.values() for reply in replies}
    if len(said) != 1:
        raise SystemExit(f"{len(said)} different replies: nothing of this can be compared")
    return [{"solver": solver, "way": way} | _summary(replies) for (solver, way), replies in rows.items()]


def _figures(events: Iterator[Event]) -> dict[str, Any]:
    begun, chunks, burnt = time.process_time(), [], []
    for event in events:
        if isinstance(event, AudioChunk):
            chunks.append(event.time)
            burnt.append(time.process_time() - begun)
    done = event
    assert isinstance(done, Done)
    stats = done.stats
    return {
        "said": (done.token_ids, done.codec_ids),
        "first_token": stats.time_to_first_token,
        "first_sound": stats.time_to_first_audio,
        "second_sound": chunks[1] if len(chunks) > 1 else chunks[0],
        "total": stats.total_time,
        "computing": sum(stats.run_seconds.values()),
        "processor_first_sound": burnt[0],
        "processor": time.process_time() - begun,
        "underruns": stats.underruns,
        "underrun_seconds": stats.underrun_seconds,
    }


def _summary(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and smallest and largest of what counts."""
    names = [name for name in replies[0] if name != "said"]
    values = {name: [reply[name] for reply in replies] for name in names}
    spreads = {f"{name}_spread": (min(values[name]), max(values[name])) for name in ("first_sound", "total")}
    return {name: statistics.median(found) for name, found in values.items()} | spreads


def main() -> None:
    """Parse, measure, print."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--solver", action="append", choices=tuple(METHODS))
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--codes", type=int, default=250)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = tuple(options.way or _USUAL)
    rows = measure(options.bundle, options.rounds, options.solver or ["rk4"], options.codes, ways)
    for row in rows:
        low, high = row["total_spread"]
        print(
            f"{row['solver']}, {row['way']}: first token {row['first_token']:.2f} s, first sound "
            f"{row['first_sound']:.2f} s ({row['first_sound_spread'][0]:.2f} to {row['first_sound_spread'][1]:.2f}), "
            f"second {row['second_sound']:.2f} s, total {row['total']:.1f} s ({low:.1f} to {high:.1f}), inside graphs "
            f"{row['computing']:.1f} s, {row['underruns']} gaps of {row['underrun_seconds']:.1f} s; processor seconds "
            f"{row['processor_first_sound']:.1f} until the first sound, {row['processor']:.1f} in all"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
