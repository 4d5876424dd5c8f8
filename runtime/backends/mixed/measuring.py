"""Measure graphs in a process of its own, within a budget of seconds; what goes wrong there is a reason, no error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...errors import UsageError
from .graph_times import GraphTimes, Told

#: seconds that opening a session may spend on measuring
BUDGET = 10.0
_VARIABLE = "OMNIPORT_MEASURE"
_CHILD = (sys.executable or "", "-m", f"{__package__}.measuring_child")
#: the least that is worth beginning another process for
_LEAST = 1.0


def budget() -> float:
    """Seconds that opening a session may spend: ``OMNIPORT_MEASURE``, or `BUDGET`.

    Raises:
        UsageError: the variable is no number of seconds.
    """
    given = os.environ.get(_VARIABLE)
    if given is None:
        return BUDGET
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{_VARIABLE} is {given!r}; seconds were expected, 0 to measure nothing")
    return seconds


def measure(
    bundle: Path, graphs: Sequence[str], threads: int, compute: str, seconds: float, command: Sequence[str] = _CHILD
) -> dict[str, GraphTimes]:
    """What was found for each graph, in this order, until the time was up. Never raises.

    A graph that would need more than all of the time has that as its problem, and so has one that ended the process.

    Args:
        threads: of one operator. compute: dtype that OpenVINO computes float32 graphs in.
    """
    end = time.monotonic() + seconds
    found: dict[str, GraphTimes] = {}
    left = list(graphs)
    room = seconds
    while left and (room == seconds or room >= _LEAST):
        told, reason = _run([*command, str(bundle), str(threads), compute, *left], room)
        room = end - time.monotonic()
        for each in told:
            if each.times is not None and each.graph in left:
                found[each.graph] = each.times
                left.remove(each.graph)
        if reason is None:  # the time was up
            if left and len(left) == len(graphs):
                problem = f"not measured: {seconds:g} s are too few for it ({_VARIABLE} gives more)"
                found[left[0]] = GraphTimes(problem=problem, budget=seconds)
            break
        if left:
            begun = [each.graph for each in told if each.graph in left]
            for graph in begun or left:
                found[graph] = GraphTimes(problem=f"not measured: {reason}")
            left = [graph for graph in left if graph not in found]
    return found


def _run(command: Sequence[str], seconds: float) -> tuple[list[Told], str | None]:
    """Lines of a process, and why it ended; None if it was ended because the time was up."""
    if not command[0]:
        return [], "there is no Python to start a process with"
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        return [], f"no process can be started ({error.strerror or error})"
    late = False
    try:
        try:
            out, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            out, said = process.communicate()
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
    return _lines(out), None if late else _reason(process.returncode, said)


def _lines(out: bytes) -> list[Told]:
    told = []
    for line in out.splitlines():
        try:
            told.append(msgspec.json.decode(line, type=Told))
        except (msgspec.MsgspecError, UnicodeDecodeError):  # half a line, of a process that was ended
            continue
    return told


def _reason(code: int, said: bytes) -> str:
    if code < 0:
        known = -code in set(signal.Signals)
        return f"its process was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else f"its process ended with exit code {code}"
