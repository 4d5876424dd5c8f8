"""What measurements share: their command line, results and tables, and a process of its own for each."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniport.runtime.system.host import resident_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
GIB = 1 << 30


def command_line(text: str | None) -> argparse.ArgumentParser:
    """A parser whose ``--help`` begins with a module's docstring."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def record(
    name: str,
    page: Callable[[Any], str],
    measure: Callable[[argparse.Namespace, Any], Iterator[Any]],
    parser: argparse.ArgumentParser,
) -> None:
    """Measure, and keep docs/results/NAME.json and the page made of it up to date; with ``--page`` make the page alone.

    Args:
        page: the text of NAME.md for what NAME.json holds.
        measure: yields what NAME.json is to hold, as often as there is more; given the options and what it held
            before, which is {} if there is none.
    """
    parser.add_argument("--page", action="store_true", help=f"measure nothing, make the page of {name}.json")
    place = RESULTS / f"{name}.json"
    found = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    if "--page" in sys.argv[1:]:
        place.with_suffix(".md").write_text(page(found), encoding="utf-8")
        return
    for result in measure(parser.parse_args(), found):
        place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        place.with_suffix(".md").write_text(page(result), encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]


def own_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What a function of a module returns when it is called in a fresh process.

    Args:
        arguments: any that JSON can hold; so has to be what is returned. The function may print to stderr only.
        environment: variables that are set for it, beside those of this process.

    Raises:
        subprocess.CalledProcessError: it failed; the reason is on stderr.
    """
    main = sys.modules["__main__"].__spec__
    module = main.name if function.__module__ == "__main__" and main is not None else function.__module__
    command = [sys.executable, "-m", "benchmarks.harness", f"{module}:{function.__name__}", json.dumps(arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": path}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=variables).stdout)


class StageMeter:
    """Seconds and peak resident memory (Linux) of each stage that a progress callback names.

    The kernel's high-water mark starts anew with every stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._stage, self._since = "start", time.perf_counter()

    def progress(self, stage: str, done: int, total: int) -> None:
        """The callback."""
        if stage != self._stage:
            self.stop()
            self._stage = stage

    def stop(self) -> None:
        """The last stage has ended."""
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), resident_memory("VmHWM") or 0)
        Path("/proc/self/clear_refs").write_text("5")
        self._since = now


def _child(name: str, arguments: str) -> None:
    module, _, function = name.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(arguments))))


if __name__ == "__main__":
    _child(*sys.argv[1:])
