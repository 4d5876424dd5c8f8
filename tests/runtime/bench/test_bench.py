"""The benchmark: what it counts, what it compares, what it refuses. Speed itself is not tested here."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from omniport.cli.main import app
from omniport.export.evaluation.transformers_rival import TransformersRival
from omniport.runtime.bench.benchmark import bench
from omniport.runtime.bench.results import BenchReport, changes, merged, read_report, write_report
from omniport.runtime.bench.roofline import alternate, ratio_of, read_profile
from omniport.runtime.bench.workloads import Sizes
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from support.bundles import edit
from support.interpreters import in_fresh_python
from typer.testing import CliRunner

SMALL = Sizes(
    audio=(1, 3),
    images=((56, 84),),
    prefill=(16,),
    context=(8, 40),
    codes=(13,),
    frames=(24,),
    text_tokens=4,
    speech_codes=26,
)
GRAPHS = ("audio_encoder", "vision_encoder", "prefill", "decode", "talker", "dit", "bigvgan")


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, tiny_checkpoint: Path) -> BenchReport:
    """Every stage that has a graph, beside transformers."""
    return bench(
        tiny_bundle,
        GRAPHS,
        rival=lambda bundle: TransformersRival(bundle, str(tiny_checkpoint), 1),
        sizes=SMALL,
        rounds=2,
        threads=1,
    )


def test_results_of_another_backend_are_kept_apart(report: BenchReport) -> None:
    with pytest.raises(UsageError, match="differ from these in backend"):
        merged(report, msgspec.structs.replace(report, backend="openvino"))


def test_a_backend_that_is_no_cpu_s_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"'tensorrt'.*ort-cpu, openvino"):
        bench(tiny_bundle, ["dit"], backend="tensorrt")


def test_both_sides_do_the_same(report: BenchReport) -> None:
    assert tuple(report.stages) == GRAPHS
    for stage, result in report.stages.items():
        for figure in result.figures:
            assert figure.difference is not None, stage
            assert 0 <= figure.difference < 1e-4, (stage, figure.name, figure.difference)
            assert figure.reference is not None
            assert figure.faster is not None
            assert figure.faster.low <= figure.faster.median <= figure.faster.high
            assert figure.seconds.runs == figure.reference.runs == 2
            assert figure.seconds.low > 0


def test_work_is_what_the_geometry_says(report: BenchReport, tiny_bundle: Path) -> None:
    """Prefill: two operations a weight and token, the head for one token, and attention."""
    thinker = Bundle.open(tiny_bundle).manifest.thinker
    width, inner, heads, kv = thinker.hidden_size, thinker.intermediate_size, thinker.num_heads, thinker.num_kv_heads
    layer = width * thinker.head_dim * (2 * heads + 2 * kv) + 3 * width * inner
    tokens = SMALL.prefill[0]
    attention = 2 * 2 * heads * tokens * tokens * thinker.head_dim
    wanted = thinker.num_layers * (2 * layer * tokens + attention) + 2 * width * thinker.vocab_size
    work = report.figure("prefill", "16").work
    assert work is not None
    assert work.operations == pytest.approx(wanted, rel=1e-6)


def test_decoding_moves_weights_and_the_live_cache(report: BenchReport, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    thinker = bundle.manifest.thinker
    short, long = (report.figure("decode", name).work for name in ("8", "40"))
    assert short is not None
    assert long is not None
    row = 4 * 2 * thinker.num_layers * thinker.num_kv_heads * thinker.head_dim
    assert long.bytes - short.bytes == 32 * row
    weights = sum(bundle.manifest.files[name].size for name in bundle.manifest.graphs["thinker"].data)
    assert short.bytes == weights + 8 * row


def test_shares_follow_from_the_rates_beside_them(report: BenchReport) -> None:
    for result in report.stages.values():
        assert result.operators
        for figure in result.figures:
            machine = figure.machine
            assert figure.work is not None
            assert machine is not None
            assert machine.read_bandwidth <= result.machine.read_bandwidth
            assert machine.matmul_rate <= result.machine.matmul_rate
            least = max(figure.work.operations / machine.matmul_rate, figure.work.bytes / machine.read_bandwidth)
            assert figure.roofline_seconds == least
            assert figure.share == least / figure.seconds.median
            assert figure.share > 0


def test_convolutions_are_counted_by_groups_and_stride() -> None:
    def event(kind: str, inputs: list[list[int]], outputs: list[list[int]]) -> dict[str, object]:
        shapes = [[{"float": shape} for shape in side] for side in (inputs, outputs)]
        arguments = {"op_name": kind, "input_type_shape": shapes[0], "output_type_shape": shapes[1]}
        return {"cat": "Node", "name": "n_kernel_time", "ts": 5, "dur": 10, "args": arguments}

    events = [
        {"cat": "Session", "name": "model_run", "ts": 0},
        {**event("Conv", [[1, 8, 50], [16, 8, 3]], [[1, 16, 50]]), "ts": 1},
        {"cat": "Session", "name": "model_run", "ts": 3},
        event("Conv", [[1, 8, 50], [16, 1, 7]], [[1, 16, 44]]),
        event("ConvTranspose", [[1, 8, 50], [8, 4, 6]], [[1, 4, 100]]),
        event("QLinearConv", [[1, 8, 50], [], [], [16, 8, 3], [16], [16]], [[1, 16, 48]]),
        event("Sin", [[1, 8]], [[1, 8]]),
    ]
    profile = read_profile(events)
    assert profile.operations == 2 * 16 * 44 * 7 + 2 * 8 * 50 * 4 * 6 + 2 * 16 * 48 * 8 * 3
    assert profile.seconds == dict.fromkeys(("Conv", "ConvTranspose", "QLinearConv", "Sin"), 1e-5)


def test_the_two_take_turns_and_warming_up_does_not_count() -> None:
    order: list[str] = []
    ours, theirs = alternate(lambda: order.append("a"), lambda: order.append("b"), rounds=3, least=0, settle=0)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert (len(ours), len(theirs)) == (3, 3)
    ratio = ratio_of([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)


def test_a_file_keeps_the_stages_that_were_not_measured_again(report: BenchReport, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_report(path, report)
    read = read_report(path)
    write_report(path, read)
    assert read_report(path) == read
    assert read.figure("dit", "13 codes").size == 13
    again = msgspec.structs.replace(report, stages={"dit": report.stages["prefill"]})
    both = merged(read, again)
    assert tuple(both.stages) == GRAPHS
    assert both.stages["dit"] == report.stages["prefill"]
    with pytest.raises(UsageError, match="precision"):
        merged(read, msgspec.structs.replace(again, precision="fp16"))


def test_a_file_of_something_else_is_refused_before_anything_is_measured(
    report: BenchReport, tiny_bundle: Path
) -> None:
    stages: list[str] = []
    other = msgspec.structs.replace(report, against="", fingerprint="0" * 64)
    with pytest.raises(UsageError, match="differ from these in fingerprint"):
        bench(tiny_bundle, ["dit"], before=other, progress=lambda stage, *_: stages.append(stage))
    assert stages == []


def test_each_stage_is_kept_as_soon_as_it_is_measured(report: BenchReport, tiny_bundle: Path) -> None:
    """What is measured before an interruption is not lost, nor what the file held before."""
    kept: list[BenchReport] = []
    earlier = msgspec.structs.replace(report, against="", stages={"prefill": report.stages["prefill"]})
    whole = bench(tiny_bundle, ["dit", "bigvgan"], sizes=SMALL, rounds=1, threads=1, before=earlier, keep=kept.append)
    assert [tuple(each.stages) for each in kept] == [("prefill", "dit"), ("prefill", "dit", "bigvgan")]
    assert kept[-1] == whole
    assert whole.stages["prefill"] == report.stages["prefill"]


def test_a_slower_ratio_is_seen_and_noise_is_not(report: BenchReport) -> None:
    def slower(factor: float) -> BenchReport:
        figure = report.figure("dit", "13 codes")
        assert figure.faster is not None
        ratio = msgspec.structs.replace(figure.faster, median=figure.faster.median * factor)
        stage = msgspec.structs.replace(report.stages["dit"], figures=(msgspec.structs.replace(figure, faster=ratio),))
        return msgspec.structs.replace(report, stages={"dit": stage})

    assert [row.ok for row in changes(report, slower(0.8))] == [True]
    assert [row.ok for row in changes(report, slower(0.7))] == [False]


def test_another_checkpoint_is_refused(tiny_bundle: Path, tiny_outlier_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="exported from"):
        bench(tiny_bundle, ["dit"], rival=lambda b: TransformersRival(b, str(tiny_outlier_checkpoint), 1))


def test_the_command_writes_json_without_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    line = ["bench", str(tiny_bundle), "--stages", "prefill", "--rounds", "1", "--json", str(out)]
    code = (
        "import sys\nfrom omniport.cli.main import run\n"
        f"try: run({line!r})\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
    )
    assert "token/s" in in_fresh_python(code)
    assert tuple(read_report(out).stages) == ("prefill",)


def test_pictures(report: BenchReport, tmp_path: Path) -> None:
    from omniport.export.evaluation.bench_picture import draw

    for name in ("a.svg", "b.png"):
        draw(report, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(UsageError, match="nothing to draw"):
        draw(msgspec.structs.replace(report, stages={}), tmp_path / "c.svg")
    assert not (tmp_path / "c.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "brain"], "no stage 'brain'"),
        (["--clock", "cpu", "--threads", "2"], "--threads 1"),
        (["--plot", "x.txt"], ".svg or .png"),
        (["--json", "missing/x.json"], "cannot write"),
        (["--json", "not.json"], "no result of"),
    ],
)
def test_bad_input_exits_with_2(
    arguments: list[str], said: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("not.json").write_text('{"schema": 1}')
    result = CliRunner().invoke(app, ["bench", str(tiny_bundle), *arguments])
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert said in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["not.json"]


def test_a_stage_without_its_graph_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "text", symlinks=True)
    edit(copy, lambda manifest: manifest["graphs"].pop("vision_encoder"))
    with pytest.raises(UsageError, match="vision_encoder"):
        bench(copy, ["vision_encoder"], rounds=1)
