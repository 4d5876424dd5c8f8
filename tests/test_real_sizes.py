"""What was measured of the published sizes holds the limits, and its page says what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
GIB = 1 << 30


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "real-sizes.json").read_text())
    return found


def test_page_is_fresh(results: dict[str, Any]) -> None:
    path = ROOT / "scripts" / "real_sizes_page.py"
    spec = importlib.util.spec_from_file_location("real_sizes_page", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (RESULTS / "real-sizes.md").read_text() == script.page(results)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_limits_of_an_export(results: dict[str, Any], size: str) -> None:
    """2 GiB, and twice the time of a copy besides tracing; an export in two runs counts as one."""
    exports = {name: found for name, found in results[size].items() if name.startswith("export bf16")}
    assert set().union(*(found["weight_bytes"] for found in exports.values())) == {
        "audio_encoder",
        "vision_encoder",
        "thinker",
        "talker",
        "dit",
        "bigvgan",
    }
    assert max(found["peak_bytes"] for found in exports.values()) <= 2 * GIB
    stages = [stage for found in exports.values() for stage in found["stages"].items()]
    tracing = sum(seconds for stage, seconds in stages if stage.startswith("tracing"))
    whole = sum(found["synced_seconds"] for found in exports.values())
    assert whole - tracing <= 2 * results[size]["copy"]["synced_seconds"]
