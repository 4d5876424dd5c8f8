"""benchmarks.build_matrix: rows that are kept, and the page made of them. Nothing is built here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omniport.runtime.bundle.reader import Bundle
from support.bundles import edit
from support.onnx_graphs import plain_model, put_graphs

from benchmarks import build_matrix

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was built, in order; the third GPU has no such format."""
    calls: list[tuple[str, str, str]] = []

    def measure(bundle: Path, graph: str, target: str) -> dict[str, Any]:
        calls.append((bundle.name, graph, target))
        about = {"precision": Bundle.open(bundle).manifest.precision, "graph": graph, "target": target, "sm": target}
        if target == "rtx-5090":
            return {**about, "failed": "it lacks fp9"}
        sizes = {"weights_bytes": 100, "engine_bytes": 105, "peak_bytes": 200, "anonymous_bytes": 150}
        return {**about, **sizes, "seconds": 1.5, "layers": {"ATTENTION_INPUT": 4}}

    monkeypatch.setattr(build_matrix, "measure", measure)
    return calls


def test_a_table_made_in_several_calls(built: list[tuple[str, str, str]], tmp_path: Path) -> None:
    bundles = {name: put_graphs(tmp_path / name, plain_model("dit"), plain_model("bigvgan")) for name in ("fp32", "w8")}
    rounded, spec = plain_model("dit")
    rounded.producer_name = "rounded"
    put_graphs(bundles["w8"], (rounded, spec), plain_model("bigvgan"))  # the vocoder is that of the other
    edit(bundles["w8"], lambda manifest: manifest.update(precision="w8"))
    for calls in (4, 8):
        assert build_matrix.Matrix(tmp_path, 4).rows(bundles) is None
        assert len(built) == calls
    rows = build_matrix.Matrix(tmp_path, 4).rows(bundles)
    assert len(rows) == 9
    assert [(row["precision"], row["target"], row["graph"]) for row in rows[:3]] == [
        ("fp32", "rtx-3090", "dit"),
        ("fp32", "rtx-3090", "bigvgan"),
        ("fp32", "rtx-4090", "dit"),
    ]
    assert {row["precision"] for row in rows[6:]} == {"w8"}
    assert {row["graph"] for row in rows[6:]} == {"dit"}
    assert len(built) == len(set(built)) == 9
    assert build_matrix.Matrix(tmp_path, 0).rows(bundles) == rows

    page = build_matrix.page({"builder": "b", "machine": "m", "engines": rows, "fp8": []})
    assert "6 engines." in page
    assert page.count("| it lacks fp9 |") == 3
    assert "| fp32 | rtx-3090 | dit | 0.0 | 0.0 | 0.0 | 1.5 | 2.00 | 1.50 | 0 | 4 | 0 |" in page

    model, spec = plain_model("bigvgan")
    model.producer_name = "another"
    put_graphs(bundles["w8"], plain_model("dit"), (model, spec))
    assert build_matrix.Matrix(tmp_path, 0).rows(bundles) is None  # another graph
    assert json.loads((tmp_path / "rows.json").read_text())
