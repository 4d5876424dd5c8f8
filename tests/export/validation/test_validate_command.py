"""omniport validate: order of the groups, what is released, exit codes, files; stand-ins compute, one test is real."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from omniport.export.validation.checks import decoding as decode_checks
from omniport.export.validation.checks import end_to_end as end_to_end_checks
from omniport.export.validation.checks import graphs as graph_checks
from omniport.export.validation.checks import layer_trace
from omniport.export.validation.checks import preprocessing as preprocess_checks
from omniport.export.validation.checks import speech as speech_checks
from omniport.export.validation.context import Context
from omniport.export.validation.types import FAIL, NOT_RUN, PASS, Check, ValidationReport
from omniport.export.validation.validate import group_names, validate
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError, PromptError, UsageError
from support.bundles import edit
from support.command_line import Omniport

Group = Callable[..., Iterator[Check]]


class StandIns:
    """Groups that compute nothing and note what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.calls: list[tuple[str, tuple[str, ...], int, dict[str, Any]]] = []
        self.backends: list[object] = []
        for module, name, stage in (
            (preprocess_checks, "preprocess_checks", "preprocess"),
            (preprocess_checks, "position_checks", "positions"),
            (graph_checks, "graph_checks", ""),
            (decode_checks, "decode_checks", ""),
            (end_to_end_checks, "end_to_end_checks", "end_to_end"),
            (speech_checks, "speech_checks", "speech"),
            (layer_trace, "trace_layers", ""),
        ):
            monkeypatch.setattr(module, name, self._group(name, stage))

    def _group(self, name: str, stage: str) -> Group:
        def group(context: Context, **options: Any) -> Iterator[Check]:
            self.backends.append(context.backend)
            self.calls.append((name, context.graphs, id(context.backend), options))
            at = stage or context.graphs[0]
            context.progress(f"{at}: a case")
            figures: dict[str, Any] = {"rel_rms": np.float64(1e-6), "count": np.int64(3)}
            yield Check(stage=at, name=f"{name}, a case", status=PASS, figures=figures, limits={"rel_rms": 1e-4})

        return group

    def replace(self, module: object, name: str, group: Group) -> None:
        self._patch.setattr(module, name, group)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(monkeypatch)


def raising(error: Exception, after: int = 1) -> Group:
    def group(context: Context, **_: Any) -> Iterator[Check]:
        for i in range(after):
            yield Check(stage=context.graphs[0], name=f"case {i}", status=PASS)
        raise error

    return group


# order and memory


def test_groups_come_in_order_and_share_a_part(stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    lines: list[tuple[str, int, int]] = []
    report, _ = validate(tiny_bundle, tiny_checkpoint, trace="thinker", progress=lambda *line: lines.append(line))
    names = [name for name, *_ in stand_ins.calls]
    assert names == [
        "preprocess_checks",
        "position_checks",
        *("graph_checks", "graph_checks"),
        *("graph_checks", "decode_checks") * 2,
        *("graph_checks", "graph_checks"),
        "end_to_end_checks",
        "speech_checks",
        "trace_layers",
    ]
    alone = [graphs for name, graphs, *_ in stand_ins.calls if name == "graph_checks"]
    assert alone == [(name,) for name in PARTS]
    assert next(graphs for name, graphs, *_ in stand_ins.calls if name == "end_to_end_checks") == tuple(PARTS)
    # one backend a part: its graphs are released before the next part is loaded
    backends = [backend for *_, backend, _ in stand_ins.calls]
    thinker = names.index("decode_checks")
    assert backends[thinker - 1] == backends[thinker]
    assert len(set(backends)) == len(names) - 3
    for backend in stand_ins.backends:
        with pytest.raises(BackendError, match="closed"):
            backend.graph("dit")
    assert report.ok
    assert [line for line, _, _ in lines if line.endswith("a case")]
    assert all(0 <= done <= total for _, done, total in lines)


def test_the_reports_facts(stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    report, _ = validate(tiny_bundle, tiny_checkpoint)
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    listed = {f for graph in manifest["graphs"].values() for f in (graph["file"], *graph["data"])}
    assert report.hashes == {name: manifest["files"][name]["sha256"] for name in listed}
    assert report.fingerprint == manifest["source"]["fingerprint"]
    assert (report.backend, report.precision, report.suite, report.emulated) == ("ort-cpu", "fp32", "quick", [])
    assert {"torch", "transformers", "onnxruntime", "python", "cpu", "threads"} <= set(report.environment)
    assert report.peak_memory_bytes > 10 << 20
    assert type(report.checks[0].figures["rel_rms"]) is float, "numpy's numbers do not go into JSON"


def test_graphs_selects_groups(stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    report, _ = validate(tiny_bundle, tiny_checkpoint, graphs=("positions", "talker"))
    assert [name for name, *_ in stand_ins.calls] == ["position_checks", "graph_checks", "decode_checks"]
    assert {check.stage for check in report.checks} == {"positions", "talker"}


def test_own_data_and_recogniser_are_handed_on(
    stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = tmp_path / "messages.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    validate(tiny_bundle, tiny_checkpoint, data=data, asr="cat -", graphs=("end_to_end", "speech"))
    assert [options for *_, options in stand_ins.calls] == [{"data": data}, {"asr": "cat -"}]


# failures


def test_an_error_in_a_group_fails_its_stage_and_the_rest_goes_on(
    stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    stand_ins.replace(decode_checks, "decode_checks", raising(ValueError("shape [3], the reference has [4]")))
    report, _ = validate(tiny_bundle, tiny_checkpoint)
    assert not report.ok
    failed = [check for check in report.checks if check.status == FAIL]
    assert [check.stage for check in failed] == ["thinker", "talker"]
    assert all("shape [3], the reference has [4]" in check.message for check in failed)
    assert any(check.name == "case 0" for check in report.checks), "what came before the error is kept"
    assert any(check.stage == "speech" and check.status == PASS for check in report.checks)


def test_a_graph_that_the_backend_refuses_is_a_failure(
    stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    stand_ins.replace(graph_checks, "graph_checks", raising(BackendError("ONNX Runtime could not run graph"), 0))
    report, _ = validate(tiny_bundle, tiny_checkpoint, graphs=("dit",))
    assert [(check.stage, check.status) for check in report.checks] == [("dit", FAIL)]


@pytest.mark.parametrize("error", [PromptError("line 3"), UsageError("line 3")])
def test_bad_input_is_no_failure_of_the_bundle(
    stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path, error: Exception
) -> None:
    stand_ins.replace(end_to_end_checks, "end_to_end_checks", raising(error))
    with pytest.raises(type(error), match="line 3"):
        validate(tiny_bundle, tiny_checkpoint, graphs=("end_to_end",))


def test_a_group_without_checks_did_not_run(stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    stand_ins.replace(speech_checks, "speech_checks", lambda context: iter(()))
    report, _ = validate(tiny_bundle, tiny_checkpoint, graphs=("speech",))
    assert [check.status for check in report.checks] == [NOT_RUN]
    assert not report.ok, "nothing ran"


def test_a_backend_that_cannot_run_here(
    stand_ins: StandIns, omniport: Omniport, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    code, out, _ = omniport("validate", tiny_bundle, tiny_checkpoint, "--backend", "tensorrt")
    assert code == 1
    assert "not proven" in out
    assert "omniport[trt]" in out or "omniport build" in out
    assert not stand_ins.calls
    report, _ = validate(tiny_bundle, tiny_checkpoint, backend="tensorrt")
    assert {check.status for check in report.checks} == {NOT_RUN}
    assert {check.stage for check in report.checks} == set(group_names()) - {"acceptance"}


def test_a_graph_that_the_bundle_lacks(
    stand_ins: StandIns, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    edit(copy, lambda manifest: manifest["graphs"].pop("dit"))
    report, _ = validate(copy, tiny_checkpoint)
    left = {check.stage: check.message for check in report.checks if check.status == NOT_RUN}
    assert set(left) == {"dit", "speech"}
    assert "the bundle holds no dit" in left["dit"]
    assert report.ok


# the command


def test_table_json_and_page(
    stand_ins: StandIns, omniport: Omniport, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    files = tmp_path / "r.json", tmp_path / "r.html"
    code, out, err = omniport("validate", tiny_bundle, tiny_checkpoint, "--json", files[0], "--html", files[1])
    assert code == 0
    for name in set(group_names()) - {"acceptance"}:
        assert name in out
    assert "rel_rms 1e-06 <= 0.0001" in out
    assert "every check that ran holds" in out
    assert "thinker" in err, "progress goes to stderr"
    report = msgspec.json.decode(files[0].read_bytes(), type=ValidationReport)
    assert report.ok
    assert "checks hold" in files[1].read_text(encoding="utf-8")
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_json_on_stdout_is_all_there_is(
    stand_ins: StandIns, omniport: Omniport, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    code, out, err = omniport("validate", tiny_bundle, tiny_checkpoint, "--json", "-", "--quiet")
    assert code == 0
    assert msgspec.json.decode(out, type=ValidationReport).ok
    assert err == ""


def test_a_failure_exits_with_1_and_names_the_stage(
    stand_ins: StandIns, omniport: Omniport, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def failing(context: Context) -> Iterator[Check]:
        yield Check(stage="dit", name="12 codes", status=FAIL, message="rel_rms is 0.2", figures={"rel_rms": 0.2})

    stand_ins.replace(graph_checks, "graph_checks", failing)
    path = tmp_path / "r.html"
    code, out, _ = omniport("validate", tiny_bundle, tiny_checkpoint, "--graphs", "dit", "--html", path)
    assert code == 1
    assert "FAIL dit: 12 codes: rel_rms is 0.2" in out
    assert "does NOT match" in out
    assert path.is_file(), "a failure is reported, too"


def test_bad_input_exits_with_2(
    stand_ins: StandIns,
    omniport: Omniport,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tiny_outlier_checkpoint: Path,
    tmp_path: Path,
) -> None:
    damaged = Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))
    weights = next(damaged.glob("graphs/*.data"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    data = tmp_path / "messages.jsonl"
    data.write_text('{"messages": [{"role": "user"}]}\n')
    good = (tiny_bundle, tiny_checkpoint)
    for arguments, words in (
        ((tmp_path, tiny_checkpoint), "bundle.json"),
        ((damaged, tiny_checkpoint), "sha256"),
        ((tiny_bundle, tiny_outlier_checkpoint), "fingerprint"),
        ((tiny_bundle, tmp_path / "nothing"), "nothing"),
        ((*good, "--graphs", "thinker,nose"), "nose"),
        ((*good, "--data", tmp_path / "missing.jsonl"), "missing.jsonl"),
        ((*good, "--data", data), "messages.jsonl:1"),
        ((*good, "--asr", "no-such-recogniser --fast"), "no-such-recogniser"),
        ((*good, "--json", tmp_path / "missing" / "r.json"), "cannot write"),
        ((*good, "--html", tmp_path), "cannot write"),
        ((*good, "--suite", "long"), "--suite"),
    ):
        code, out, err = omniport("validate", *arguments, "--quiet")
        assert code == 2, (arguments, err)
        assert out == ""
        assert words in err
        assert "Traceback" not in err
    assert not stand_ins.calls


@pytest.mark.parametrize(
    "options", [{"backend": "abacus"}, {"suite": "long"}, {"graphs": ("nose",)}, {"trace": "dit"}], ids=str
)
def test_wrong_options_are_usage_errors(options: dict[str, Any], tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError):
        validate(tiny_bundle, tiny_checkpoint, **options)


def test_help(omniport: Omniport) -> None:
    code, out, _ = omniport("validate", "--help")
    assert code == 0
    assert next(line.strip() for line in out.splitlines() if line.startswith("  ")).startswith("Compare")
    assert "--json" in out
    assert "--quiet" in out
    assert " ".join(out.strip().rpartition("\n\n")[2].split()).startswith("Example: omniport validate")


# for real


@pytest.mark.slow
def test_the_quick_suite_holds_on_tiny_within_its_time(
    omniport: Omniport, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """60 s for a machine of its own: processor time is what a busy one leaves comparable."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    files = tmp_path / "r.json", tmp_path / "r.html"
    code, out, err = omniport(
        "validate", tiny_bundle, tiny_checkpoint, "--trace", "thinker", "--json", files[0], "--html", files[1]
    )
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert code == 0, out + err
    report = msgspec.json.decode(files[0].read_bytes(), type=ValidationReport)
    assert {check.status for check in report.checks} == {PASS}
    assert {check.stage for check in report.checks} == {*group_names(), "conditioning", "solver"} - {"acceptance"}
    names = [(check.stage, check.name) for check in report.checks]
    assert len(names) == len(set(names)), "names are unique within a stage"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    page = files[1].read_text(encoding="utf-8")
    assert page.count("<audio") >= 3
    assert "Error by layer" in page
    assert "Tokens of the replies" in page


def test_a_graph_that_never_ran_is_no_proof() -> None:
    from omniport.export.validation.validate import _proven

    def check(stage: str, status: str) -> Check:
        return Check(stage=stage, name="case", status=status)

    assert _proven([check("dit", "pass"), check("speech", "not_run")], ["dit"])
    assert not _proven([check("dit", "pass"), check("bigvgan", "not_run")], ["dit", "bigvgan"])
    assert not _proven([check("dit", "pass"), check("dit", "fail")], ["dit"])
    assert not _proven([check("dit", "not_run")], ["dit"])
    assert not _proven([], [])
