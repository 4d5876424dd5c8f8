"""docs/results/validate.md: written from validate.json by its script, and it tells of failures."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from benchmarks import validate
from benchmarks.harness import RESULTS


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "validate.json").read_text(encoding="utf-8"))
    return found


def test_every_size_precision_and_suite_was_measured(results: list[dict[str, Any]]) -> None:
    measured = {(r["size"], r["suite"], r["precision"], r["cache"]) for r in results}
    assert measured == {
        (size, suite, precision, state)
        for size in validate.SIZES
        for suite in validate.SUITES
        for precision in validate.CACHES[size]
        for state in validate.CACHES[size][precision]
        if (size, suite) != ("small", "full")
    }


def test_the_page_tells_of_failures(results: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(results)
    first = changed[0]
    assert first["ok"]
    first |= {"ok": False, "failed": ["dit: a case: wrong"], "not_run": ["dit: load: no GPU"], "seconds": 75.0}
    text = validate.page(changed)
    name = f"{first['size']} {first['precision']} {first['suite']} ({first['cache']})"
    passing = sum(result["ok"] for result in changed)
    assert f"{passing} of {len(results)} runs pass" in text
    assert f"these fail: {name}" in text
    assert f"Fails in {name}: dit: a case: wrong." in text
    assert f"Not run in {name}: dit: load: no GPU." in text
    assert "at most 75 s (asked for: under 60 s)" in text
    assert "| NO |" in text
