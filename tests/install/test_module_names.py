"""A module name stands twice only where both are the same thing, seen from two sides (CONTRIBUTING.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

import pytest
from support.paths import REPOSITORY

FOLDERS = ("cli", "calib", "export", "serve", "runtime", "benchmarks")

#: names that stand twice for different things: none, and none is to be added
LEFT: set[str] = set()


def side(path: str) -> str:
    """What a module is to the others of its name."""
    folder = PurePosixPath(path).parent.as_posix()
    if folder == "benchmarks":
        return "benchmark"
    if folder == "cli/commands":
        return "command"
    if folder == "export/models":
        return "part"
    if folder == "runtime/generation":
        return "runs a part"
    return "backend" if folder.startswith("runtime/backends/") else "library"


def clashes(paths: Iterable[str]) -> set[str]:
    """Names of several modules that are not one thing."""
    named: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        named[PurePosixPath(path).name].append(side(path))
    return {name for name, sides in named.items() if len(sides) > 1 and not _one_thing(sides)}


def _one_thing(sides: list[str]) -> bool:
    if set(sides) == {"backend"} or sorted(sides) == ["part", "runs a part"]:
        return True
    library = [each for each in sides if each not in ("command", "benchmark")]
    return len(library) <= 1 and len(set(sides)) == len(sides)


def test_a_name_stands_twice_for_one_thing_only() -> None:
    files = (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py") if path.name != "__init__.py")
    assert clashes(path.relative_to(REPOSITORY).as_posix() for path in files) == LEFT


@pytest.mark.parametrize(
    ("paths", "clash"),
    [
        (["cli/commands/plan.py", "export/planning/plan.py", "benchmarks/plan.py"], False),
        (["export/models/talker.py", "runtime/generation/talker.py"], False),
        (["runtime/backends/onnxruntime/kv_cache.py", "runtime/backends/tensorrt/kv_cache.py"], False),
        (["export/report.py", "calib/report.py"], True),
        (["export/models/layers.py", "export/validation/layers.py"], True),
        (["cli/commands/plan.py", "export/plan.py", "calib/plan.py"], True),
    ],
)
def test_a_clash_is_seen(paths: list[str], clash: bool) -> None:
    assert bool(clashes(paths)) == clash
