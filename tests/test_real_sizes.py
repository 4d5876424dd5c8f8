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


def test_exports_stay_within_two_gigabytes(results: dict[str, Any]) -> None:
    exports = [found for steps in results.values() if isinstance(steps, dict) for found in steps.items()]
    peaks = [found["peak_bytes"] for name, found in exports if name.startswith("export")]
    assert peaks
    assert max(peaks) <= 2 * GIB
