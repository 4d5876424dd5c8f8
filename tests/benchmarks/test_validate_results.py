"""docs/results/validate.md: written from validate.json by its script, and it tells of failures."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import Any

import pytest
from support.paths import REPOSITORY

RESULTS = REPOSITORY / "docs" / "results"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_validate", REPOSITORY / "scripts" / "measure_validate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "validate.json").read_text(encoding="utf-8"))
    return found


def test_the_page_is_what_was_measured(script: Any, results: list[dict[str, Any]]) -> None:
    assert script.page(results) == (RESULTS / "validate.md").read_text(encoding="utf-8")


def test_every_size_precision_and_suite_was_measured(script: Any, results: list[dict[str, Any]]) -> None:
    measured = {(r["size"], r["suite"], r["precision"], r["cache"]) for r in results}
    assert measured == {
        (size, suite, precision, state)
        for size in script.SIZES
        for suite in script.SUITES
        for precision in script.PRECISIONS
        for state in script.CACHES[size][precision]
        if (size, suite) != ("small", "full")
    }


def test_the_page_tells_of_failures(script: Any, results: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(results)
    first = changed[0]
    first |= {"ok": False, "not_run": ["dit: load: no GPU"], "seconds": 75.0}
    text = script.page(changed)
    name = f"{first['size']} {first['precision']} {first['suite']} ({first['cache']})"
    assert f"{len(results) - 1} of {len(results)} runs pass" in text
    assert f"these fail: {name}." in text
    assert f"Not run in {name}: dit: load: no GPU." in text
    assert "at most 75 s (asked for: under 60 s)" in text
    assert "| NO |" in text
