"""Time two ways of doing the same thing in alternation, so that other load affects both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from .results import Timing

Clock = Callable[[], float]

#: wall: what a user waits for, on an idle machine. cpu: processor time of the process, which other programs hardly
#: change; it says nothing of threads, so it goes with one.
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

#: seconds between the two: threads of the one's pool go to sleep before the other is timed
SETTLE = 0.05


def alternate(
    ours: Callable[[], object],
    theirs: Callable[[], object] | None,
    rounds: int,
    least: float = 0.2,
    settle: float = SETTLE,
    clock: Clock = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Seconds of each, round by round. One run of each before the first round warms up and does not count.

    Args:
        least: a round repeats what is short until this many seconds have passed, and counts the average of it.
    """
    runs = [run for run in (ours, theirs) if run is not None]
    repeats = [_repeats(run, least, clock) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, repeat, kept in zip(runs, repeats, times, strict=True):
            time.sleep(settle)
            kept.append(_seconds(run, repeat, clock))
    return times[0], times[1] if theirs is not None else []


def _repeats(run: Callable[[], object], least: float, clock: Clock) -> int:
    once = _seconds(run, 1, clock)
    return max(1, min(20, round(least / max(once, 1e-9))))


def _seconds(run: Callable[[], object], repeat: int, clock: Clock) -> float:
    begin = clock()
    for _ in range(repeat):
        run()
    return (clock() - begin) / repeat


def spread(values: Sequence[float]) -> Timing:
    """Median, smallest and largest."""
    return Timing(median=statistics.median(values), low=min(values), high=max(values), runs=len(values))


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> Timing:
    """How many times as fast ours is, round by round: the two of a round had the same neighbours."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])
