"""A part that the product does not know is added through the registry alone, and goes the whole way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from omniport.cli.main import app
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.evaluation.transformers_rival import TransformersRival
from omniport.export.exporter import export_checkpoint
from omniport.export.graphs.trace import trace
from omniport.export.models.model_parts import MODEL_PARTS, graph_definitions, register, unregister
from omniport.export.models.module import ExportModule, Linear
from omniport.export.models.part import Case, GraphDefinition, ModelPart, ReferenceModule, Settings, Subject, f32
from omniport.export.validation.types import FAIL
from omniport.export.validation.validate import validate
from omniport.runtime.bench.benchmark import bench
from omniport.runtime.bundle.graph_spec import DimRange
from omniport.runtime.bundle.parts import PARTS, Part
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BundleError, CheckpointError, UsageError
from omniport.runtime.speech.ode import rk4_schedule
from support.checkpoints import rewritten
from torch import Tensor, nn
from typer.testing import CliRunner

WIDTH = 24


class Mood(ExportModule):
    """Says of every row how cheerful it is."""

    prefix = "mood."

    def __init__(self) -> None:
        super().__init__()
        self.proj = Linear(WIDTH, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.proj(rows.to(self.proj.weight.dtype))).float()


def define(_config: Any, settings: Settings) -> GraphDefinition:
    return GraphDefinition(
        name="mood",
        precision=settings.precision,
        geometry=str(WIDTH),
        build=Mood,
        inputs=(f32("rows", "count", WIDTH),),
        outputs=(f32("moods", "count", 3),),
        dims={"count": DimRange(1, 8, 64)},
    )


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 3)

    def forward(self, rows: Tensor) -> Tensor:
        moods: Tensor = self.proj(rows).tanh()
        return moods


def cases(subject: Subject) -> Iterator[Case]:
    for count in (subject.bundle.manifest.graphs["mood"].dims["count"].max, 1, 5):
        rows = np.random.default_rng(count).standard_normal((count, WIDTH), np.float32)
        yield Case(
            "mood",
            f"{count} rows",
            lambda graph, rows=rows: graph.run({"rows": rows})["moods"],  # type: ignore[misc]
            lambda module, rows=rows: module(torch.from_numpy(rows)),  # type: ignore[misc]
            (rows,),
        )


MOOD = ModelPart(
    Part("mood", "moods"),
    define=define,
    reference=ReferenceModule(lambda _config: Reference(), Mood.prefix),
    cases=cases,
    ask=lambda given, _bundle, _ckpt: lambda module: module(torch.from_numpy(given["feeds"]["rows"])),
)


@pytest.fixture
def mood() -> Iterator[None]:
    register(MOOD)
    try:
        yield
    finally:
        if "mood" in PARTS:
            unregister("mood")


@pytest.fixture(scope="module")
def moody_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` with the weights of the seventh part."""

    def add(weights: dict[str, Tensor]) -> None:
        torch.manual_seed(7)
        weights |= {"mood.proj.weight": torch.randn(3, WIDTH) / 5, "mood.proj.bias": torch.randn(3) / 5}

    return rewritten(tiny_checkpoint, tmp_path_factory.mktemp("moody") / "checkpoint", add)


def test_it_goes_the_whole_way(mood: None, moody_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    report = export_checkpoint(moody_checkpoint, out, max_context=4096)
    assert [row.name for row in report.graphs] == [*PARTS] == [*MODEL_PARTS]
    assert list(PARTS)[-1] == "mood"
    assert Bundle.open(out, verify=True).manifest.graphs["mood"].dims["count"].max == 64

    # listed
    listed = msgspec.json.decode(CliRunner().invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert listed["graph_bytes"]["mood"] > 4 * 3 * WIDTH
    assert "moods float32 [count,3]" in CliRunner().invoke(app, ["inspect", str(out)]).stdout

    # compared with its reference
    checked, _ = validate(out, moody_checkpoint, graphs=["mood"])
    assert checked.ok
    assert [check.name for check in checked.checks] == ["64 rows", "1 rows", "5 rows"]
    assert all(check.figures["rel_rms"] <= check.limits["rel_rms"] for check in checked.checks)  # type: ignore[operator]

    # measured, alone and beside its reference
    measured = bench(
        out, ["mood"], rival=lambda bundle: TransformersRival(bundle, str(moody_checkpoint), 1), rounds=1, threads=1
    )
    (figure,) = measured.stages["mood"].figures
    assert figure.work is not None
    assert figure.work.operations == 2 * 8 * WIDTH * 3
    assert figure.difference is not None
    assert figure.difference < 1e-5


def test_it_is_traced_with_its_own_precision(mood: None, moody_checkpoint: Path) -> None:
    config = Checkpoint.open(moody_checkpoint).config
    for precision, dtype in (("fp32", "FLOAT"), ("fp16", "FLOAT16"), ("bf16", "BFLOAT16")):
        definition = graph_definitions(config, precision, 4096, rk4_schedule(), False)["mood"]
        model, rules = trace(definition)
        assert model.graph.initializers["proj.weight"].dtype.name == dtype  # type: ignore[union-attr]
        assert set(rules) == {"proj.weight", "proj.bias"}


def test_a_graph_that_is_not_its_reference_is_found(
    mood: None, moody_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    export_checkpoint(moody_checkpoint, out, graphs=["mood"], max_context=4096)
    monkeypatch.setattr(Reference, "forward", lambda self, rows: self.proj(rows).sigmoid())
    monkeypatch.setenv("OMNIPORT_CACHE", "")  # no results of the right one
    checked, _ = validate(out, moody_checkpoint, graphs=["mood"])
    assert not checked.ok
    assert {check.status for check in checked.checks} == {FAIL}


def test_without_it_nothing_knows_it(mood: None, moody_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_checkpoint(moody_checkpoint, out, graphs=["mood"], max_context=4096)
    Bundle.open(out)
    unregister("mood")
    with pytest.raises(BundleError, match=r"graph 'mood' .* is not one of audio_encoder"):
        Bundle.open(out)
    with pytest.raises(CheckpointError, match=r"does not have: mood\.proj\.bias, mood\.proj\.weight"):
        export_checkpoint(moody_checkpoint, tmp_path / "other", max_context=4096)
    with pytest.raises(UsageError, match="nothing to check is named mood"):
        validate(tmp_path, tmp_path, graphs=["mood"])


def test_a_name_is_taken_once(mood: None) -> None:
    with pytest.raises(ValueError, match="there is a part 'mood' already"):
        register(MOOD)
