"""The quantization report: its figures against figures worked out here, its page, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from omniport.calib.calibration_file import CLIPS, Calibration, Header, Site, SiteRecord
from omniport.calib.quantizer import quantize
from omniport.calib.report.compare import BundleLoss, LossReport, compare
from omniport.calib.report.layer_loss import sqnr_db
from omniport.calib.report.quant_page import render
from omniport.cli import main
from omniport.export.evaluation.questions import AnswerFigures
from omniport.export.evaluation.speech_metrics import log_mel_power, mel_cepstral_distortion, mel_l1
from omniport.export.evaluation.stored_weights import unscaled
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from onnx import numpy_helper

ASKED = '{"messages": [{"role": "user", "content": "What can you tell me about the sea?"}]}\n'
Waves = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]


@pytest.fixture(scope="module")
def room(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny`` in INT4, its DiT in INT8, and a conversation."""
    folder = tmp_path_factory.mktemp("report")
    quantize(tiny_bundle, folder / "int4", "int4", graph_recipes={"dit": "w8", "audio_encoder": "w8"})
    (folder / "talk.jsonl").write_text(ASKED)
    return folder


def calibration(bundle: Path) -> Calibration:
    """Made up: one site."""
    weight = "model.layers.0.mlp.down_proj.weight"
    hist = np.zeros(2048, np.int64)
    hist[:100] = 1000
    record = SiteRecord(weights=(weight,), kind="matmul", count=int(hist.sum()), clips=dict.fromkeys(CLIPS, 0.5))
    header = Header(
        fingerprint=Bundle.open(bundle).manifest.source.fingerprint,
        data="0" * 64,
        samples=1,
        seed=0,
        created_by={},
        graphs={"thinker": (record,)},
    )
    return Calibration(header, {"thinker": (Site(record, {"absmax": np.full(320, 8, np.float32), "hist": hist}),)})


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, room: Path) -> tuple[LossReport, Waves]:
    return compare(tiny_bundle, [room / "int4"], data=room / "talk.jsonl", calibration=calibration(tiny_bundle))


def quantized(report: LossReport) -> BundleLoss:
    return report.bundles[1]


def test_the_unquantized_bundle_is_equal_to_itself(measured: tuple[LossReport, Waves]) -> None:
    report, waves = measured
    base = report.bundles[0]
    assert (base.recipe, report.conversations) == ("fp32", ["talk.jsonl:1"])
    losses = {row.graph: row.loss for row in base.graphs}
    assert all(loss is None or loss.sqnr_db == 300 for loss in losses.values())
    assert base.sound is not None
    assert (base.sound.mel_sqnr_db, base.sound.wave_sqnr_db, base.sound.mel_l1) == (300, 300, 0)
    assert [len(wave) for wave in waves.values()] == [32 * 480] * 2
    assert float(np.std(waves["int4"])) > 1e-3


def test_what_was_lost(measured: tuple[LossReport, Waves], room: Path) -> None:
    row = quantized(measured[0])
    losses = {graph.graph: graph.loss for graph in row.graphs}
    for name, least, most in (("thinker", 8, 25), ("talker", 8, 30), ("dit", 30, 80)):
        loss = losses[name]
        assert loss is not None
        assert least < loss.sqnr_db < most, name
    assert losses["bigvgan"].sqnr_db == 300  # type: ignore[union-attr]
    assert row.sound is not None
    assert 20 < row.sound.mel_sqnr_db < 90  # by the DiT's rounding alone: both say the same codes
    assert 0 < row.sound.mel_l1 < 0.2
    wanted, got = measured[1].values()
    noise = np.square(got - wanted, dtype=np.float64).sum()
    assert row.sound.wave_sqnr_db == pytest.approx(10 * np.log10(np.square(wanted, dtype=np.float64).sum() / noise))
    spectra = log_mel_power(got), log_mel_power(wanted)
    assert row.sound.mel_l1 == mel_l1(*spectra)
    assert row.sound.mcd_db == mel_cepstral_distortion(*spectra) != row.sound.mel_l1
    thinker = row.graphs[2]
    assert thinker.prefill_ms > 1.5 * thinker.step_ms > 0
    graphs, record = room / "int4" / "graphs", thinker.graph
    assert thinker.bytes == sum(file.stat().st_size for file in graphs.glob(f"{record}.onnx*"))
    sizes = {graph.graph: graph.bytes for graph in row.graphs}
    assert sizes["thinker"] < 0.3 * measured[0].bundles[0].graphs[2].bytes
    assert all(graph.step_ms > 0 for graph in row.graphs if graph.loss is not None)


def test_what_was_not_measured_is_said(measured: tuple[LossReport, Waves]) -> None:
    row = quantized(measured[0])
    assert row.missing == dict.fromkeys(("audio_encoder", "vision_encoder"), "no conversation reached it")
    layers = next(graph.layers for graph in row.graphs if graph.graph == "audio_encoder")
    assert all(layer.output_db is None and layer.weight_db is not None for layer in layers)
    assert measured[0].missing == {}


def test_layers(measured: tuple[LossReport, Waves], tiny_bundle: Path, room: Path) -> None:
    """Weights against what the files hold, worked out here; outputs get worse from layer to layer."""
    thinker = next(graph for graph in quantized(measured[0]).graphs if graph.graph == "thinker")
    layers = {layer.weight: layer for layer in thinker.layers}
    assert len(layers) == 29
    arrays = [
        {t.name: numpy_helper.to_array(t) for t in onnx.load(root / "graphs/thinker.onnx").graph.initializer}
        for root in (tiny_bundle, room / "int4")
    ]
    for part, scheme in (("2.mlp.up_proj", "int4-32"), ("1.self_attn.q_proj", "w8")):
        name = f"model.layers.{part}.weight"
        wanted, integers, scales = arrays[0][name], arrays[1][f"{name}.integers"], arrays[1][f"{name}.scales"]
        got = integers.astype(np.float64) * (scales.repeat(32, 0) if scheme == "int4-32" else scales)
        expected = 10 * np.log10((wanted.astype(np.float64) ** 2).sum() / ((got - wanted) ** 2).sum())
        assert layers[name].scheme == scheme
        assert layers[name].weight_db == pytest.approx(expected, abs=1e-3)
        assert layers[name].output_db is not None
    first, last = (layers[f"model.layers.{i}.mlp.down_proj.weight"].output_db for i in (0, 3))
    assert first is not None
    assert last is not None
    assert 10 < last < first < 25


def test_scaled_rows_and_columns_are_no_loss() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    rows, columns = rng.uniform(0.1, 10, (64, 1)), rng.uniform(0.1, 10, (1, 48))
    noise = 0.01 * rng.standard_normal(weight.shape)
    scaled = ((weight + noise) * rows).astype(np.float32)
    assert sqnr_db(scaled, weight) < 10
    assert sqnr_db(unscaled(scaled, weight), weight) == pytest.approx(40, abs=0.5)
    assert sqnr_db(unscaled((weight * columns).astype(np.float32), weight), weight) > 20
    both = ((weight + noise) * rows * columns).astype(np.float32)
    assert sqnr_db(unscaled(both, weight), weight) == pytest.approx(40, abs=0.5)
    assert sqnr_db(weight, weight) == 300


def test_the_page(measured: tuple[LossReport, Waves]) -> None:
    report, waves = measured
    page = render(report, waves)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Recipe against recipe",
        "Each graph by itself",
        "Layer by layer",
        "Ranges",
        "Sound",
        "What was not measured",
        "Environment",
    ]
    thinker = next(graph.loss for graph in quantized(report).graphs if graph.graph == "thinker")
    assert thinker is not None
    assert f">{thinker.sqnr_db:.1f}</td>" in page
    assert page.count("<audio ") == 2
    assert page.count("data:image/svg") == 2 * 3 + 1 + 1  # audio_encoder has no outputs to draw
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", re.sub(r'"data:[^"]*"', "", page))
    assert "no conversation reached it" in page


def with_answers(report: LossReport) -> LossReport:
    """As if both bundles had answered a question set of two kinds."""
    right: list[dict[str, tuple[int, int]]] = [{"typed": (4, 4), "spoken": (3, 4)}, {"typed": (2, 4), "spoken": (0, 4)}]
    found = [
        AnswerFigures(questions=8, right=kinds, spoken=8, word_error_rate=error, ended=8, seconds=12.0)
        for kinds, error in zip(right, (0.021, 0.5), strict=True)
    ]
    bundles = [replace(b, answers=answers) for b, answers in zip(report.bundles, found, strict=True)]
    return replace(report, bundles=bundles)


def test_answers_are_shown(
    measured: tuple[LossReport, Waves], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = with_answers(measured[0])
    page = render(report, measured[1])
    section = page[page.index("Right answers") : page.index("Size and speed")]
    for cell in ("88%", "100%", "75%", "25%", "0%", "2%", "50%", "8 of 8", "typed", "spoken"):
        assert cell in section, cell
    assert "Right answers" not in render(*measured)
    monkeypatch.setattr("omniport.calib.compare", lambda *_arguments, **_options: (report, {}))
    with pytest.raises(SystemExit):
        main.run(["quant-report", "a", "b", "--questions", "c.jsonl"])
    shown = capsys.readouterr().out
    assert re.search(r"87\.5% +2\.1%", shown)
    assert re.search(r"25\.0% +50\.0%", shown)


@pytest.mark.slow
def test_questions_are_asked_of_every_bundle(tiny_bundle: Path, room: Path, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed (pip install omniport[hear])")
    asked = tmp_path / "questions.jsonl"
    asked.write_text(json.dumps({**json.loads(ASKED.splitlines()[0]), "answer": "The sky is blue."}) + "\n")
    report = compare(tiny_bundle, [room / "int4"], data=room / "talk.jsonl", questions=asked).report
    for bundle in report.bundles:
        assert bundle.answers is not None
        assert bundle.answers.right == {"": (0, 1)}, "weights are random"
        assert bundle.answers.spoken == 1
        assert (bundle.answers.word_error_rate or 0) >= 0.5


def test_the_command(
    measured: tuple[LossReport, Waves],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only what the command does: the figures are those measured above."""
    monkeypatch.setattr("omniport.calib.compare", lambda *_arguments, **_options: measured)
    for options, code in (([], 0), (["--json"], 0), (["--html", str(tmp_path / "no" / "page.html")], 2)):
        with pytest.raises(SystemExit) as stopped:
            main.run(["quant-report", "a", "b", *options])
        assert stopped.value.code == code
        shown = capsys.readouterr()
        if options == []:
            assert re.search(r"int4 +int4 +[\d.]+ MB", shown.out)
            assert "int4: vision_encoder not measured: no conversation reached it" in shown.err
        elif code == 0:
            assert json.loads(shown.out)["bundles"][1]["recipe"] == "int4"
        else:
            assert "there is no folder" in shown.err


def test_bundles_that_do_not_belong_together(tiny_bundle: Path, room: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is quantized: give the bundle that the others were made from first"):
        compare(room / "int4", [room / "int4"])
    other = tmp_path / "other"
    shutil.copytree(room / "int4", other)
    text = (other / "bundle.json").read_text()
    fingerprint = Bundle.open(tiny_bundle).manifest.source.fingerprint
    (other / "bundle.json").write_text(text.replace(fingerprint, "f" * 64))
    with pytest.raises(UsageError, match="made from another checkpoint"):
        compare(tiny_bundle, [other])
    with pytest.raises(UsageError, match=r"cannot read .*none\.jsonl"):
        compare(tiny_bundle, [room / "int4"], data=tmp_path / "none.jsonl")
