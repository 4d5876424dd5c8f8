"""Committed figures: pages are those of their JSON files, and what was asked of quantized bundles was reached."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime.bench.results import read_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
#: page -> script whose ``page`` makes it
PAGES = {
    "quant": "measure_quant",
    "search": "measure_search",
    "calibrate": "measure_calibrate",
    "vocoder": "measure_vocoder",
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_fresh(name: str, script: Any) -> None:
    assert (RESULTS / f"{name}.md").read_text() == script(PAGES[name]).page(results(name))


def test_other_pages_are_fresh(script: Any) -> None:
    """Pages made of more than plain JSON: of a report with notes written by hand, and of builds."""
    report = read_report(RESULTS / "bench.json")
    assert (RESULTS / "bench.md").read_text() == script("bench_page").page(report)
    assert (RESULTS / "build-matrix.md").read_text() == script("build_matrix").render(results("build-matrix"))


def test_what_was_asked_of_quantized_bundles(script: Any) -> None:
    """Limits of size, of decode and prefill speed beside FP32, and of the logits, on `small --outliers`."""
    found = results("quant")
    assert "--outliers" in found["bundle"]
    thinker, base = found["parts"]["thinker"], found["sizes"]["base"]
    for recipe, (size, decode, prefill, loss) in script("measure_quant").ASKED.items():
        row, parts = thinker[recipe], ("thinker", "talker")
        if size is not None:
            assert sum(found["sizes"][recipe][part] for part in parts) <= size * sum(base[part] for part in parts)
        assert thinker["base"]["decode"] / row["decode"] >= decode, recipe
        assert prefill is None or thinker["base"]["prefill"] / row["prefill"] >= prefill, recipe
        assert loss is None or row["sqnr"] >= loss, recipe
    assert thinker["int8"]["sqnr"] - thinker["int8-plain"]["sqnr"] >= 10
    assert thinker["int4"]["sqnr"] - thinker["int4-alone"]["sqnr"] >= 1
    graphs = [name for name in base if name != "all"]
    assert sum(found["sizes"]["int8"][name] for name in graphs) <= 0.30 * sum(base[name] for name in graphs)
    assert min(found["speech"]["int8"].values()) >= 20  # else the default recipe would have to leave the graph alone
