"""Two hundred turns on a real bundle: each equal to its oracle, memory and threads flat."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support.paths import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "soak.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc, which Linux has")
def test_soak(tiny_bundle: Path) -> None:
    figures = load().soak(tiny_bundle, 200)
    assert figures["compared"] > 100
    assert figures["spoken"] > 20
    assert figures["cancelled"] > 20
    assert figures["dropped_turns"] > 20
    assert figures["memory_growth"] < 0.05, figures
    assert figures["threads_most"] == figures["threads_first"], figures
