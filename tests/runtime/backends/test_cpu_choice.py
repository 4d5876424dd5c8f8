"""``auto`` on a CPU: each graph in the backend that was measured to be quicker, what is kept of that, what is said."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from omniport.export.validation.tolerances import limit
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.mixed import choice, measuring
from omniport.runtime.backends.mixed.choice import Choice, choose
from omniport.runtime.backends.mixed.graph_times import OPENVINO, ORT, GraphTimes, TimesFile
from omniport.runtime.backends.openvino.backend import OpenVinoBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, UsageError
from support.command_line import Omniport
from support.fake_backend import FakeBackend
from support.onnx_graphs import plain_model, put_graphs

QUICK, SLOW = (GraphTimes(seconds={ORT: ours, OPENVINO: 1.0}, difference=1e-6) for ours in (1.2, 0.8))


class StandIn(FakeBackend):
    """In place of OpenVINO, which tests of the choice do not need."""

    def __init__(self, bundle: Bundle, threads: int | None = None, compute: str = "float32") -> None:
        super().__init__(bundle.manifest, room=1)
        self.name = "openvino" if compute == "float32" else f"openvino ({compute})"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(put_graphs(tmp_path / "b", *(plain_model(name) for name in ("dit", "bigvgan", "audio_encoder"))))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Both are installed; measuring finds that OpenVINO is quicker with the DiT. Gives the graphs of each time."""
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMNIPORT_MEASURE", "5")
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: None)
    monkeypatch.setattr("omniport.runtime.backends.select._cuda_runs", lambda: False)
    monkeypatch.setattr("omniport.runtime.backends.openvino.backend.OpenVinoBackend", StandIn)
    monkeypatch.setattr(choice, "openvino_version", lambda: "2026.4.1")
    times: list[tuple[str, ...]] = []

    def measure(root: Path, graphs: Sequence[str], threads: int, compute: str, seconds: float) -> Mapping[str, Any]:
        assert seconds == 5
        times.append(tuple(graphs))
        return {name: QUICK if name == "dit" else SLOW for name in graphs}

    monkeypatch.setattr(choice, "measure", measure)
    return times


def opened(bundle: Bundle, **options: Any) -> str:
    return open_backend("auto", bundle, **options).name


# where a graph runs


@pytest.mark.parametrize(
    ("times", "backend", "why"),
    [
        (None, ORT, "not measured yet"),
        (QUICK, OPENVINO, "OpenVINO takes 1,000.0 ms and ONNX Runtime 1,200.0"),
        (SLOW, ORT, "OpenVINO takes 1,000.0 ms and ONNX Runtime 800.0"),
        (GraphTimes(seconds={ORT: 1.04, OPENVINO: 1.0}), ORT, "OpenVINO takes 1,000.0 ms and ONNX Runtime 1,040.0"),
        (GraphTimes(problem="it is broken"), ORT, "it is broken"),
        (msgspec.structs.replace(QUICK, difference=2e-4), ORT, "OpenVINO's result differs by 0.0002, and 0.0001 is"),
        (msgspec.structs.replace(QUICK, difference=float("inf")), ORT, "OpenVINO's result differs by inf"),
    ],
)
def test_a_graph_runs_where_it_is_quicker_and_right(times: GraphTimes | None, backend: str, why: str) -> None:
    found = choose(plain_model()[1], times)
    assert found.backend == backend
    assert found.why.startswith(why)


def test_what_results_may_differ_by_is_as_in_validation() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        assert choice.DIFFERENCES[dtype] == limit("graph.rel_rms", dtype).value
    for dtype in ("int8", "int4", "fp8"):
        assert choice.DIFFERENCES[dtype] == limit("decode.rel_rms", dtype).value
    spec, times = plain_model()[1], msgspec.structs.replace(QUICK, difference=3e-2)
    assert choose(spec, times).backend == ORT
    assert choose(spec, times, "bf16").backend == OPENVINO
    assert choose(msgspec.structs.replace(spec, precision="int8", compute="float32"), times).backend == OPENVINO


# measured once, and kept


def test_what_is_measured_is_used_and_kept(
    bundle: Bundle, measured: list[tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """The first session says that it measures, before it does; what was found goes to the log."""
    caplog.set_level(logging.INFO)
    with pytest.warns(RuntimeWarning, match=r"bigvgan, dit, audio_encoder of .* measured now, for 5 s at most"):
        assert opened(bundle) == "openvino (dit) + ort-cpu"
    assert measured == [("bigvgan", "dit", "audio_encoder")], "what takes most of a reply's time first"
    assert "auto runs dit in openvino: OpenVINO takes 1,000.0 ms and ONNX Runtime 1,200.0" in caplog.messages
    assert opened(bundle) == "openvino (dit) + ort-cpu"
    assert len(measured) == 1
    assert choice.choices(bundle)["bigvgan"] == Choice(ORT, "OpenVINO takes 1,000.0 ms and ONNX Runtime 800.0")


def test_anything_that_matters_measures_anew(
    bundle: Bundle, measured: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bundle.open(put_graphs(tmp_path / "other", plain_model("dit")))
    count = 0
    for case in (bundle, other):
        for threads in (1, 2):
            for version in ("2026.4.1", "2026.5.0"):
                for processor in ("one", "another"):
                    monkeypatch.setattr(choice, "openvino_version", lambda version=version: version)
                    monkeypatch.setattr("omniport.runtime.system.host.cpu_name", lambda processor=processor: processor)
                    with pytest.warns(RuntimeWarning, match="measured now"):
                        opened(case, threads=threads)
                    count += 1
                    opened(case, threads=threads)
                    assert len(measured) == count


@pytest.mark.parametrize("name", ["OMNIPORT_MEASURE", "OMNIPORT_CACHE"])
def test_nothing_is_measured_where_it_is_not_wanted_or_cannot_be_kept(
    bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "0" if name == "OMNIPORT_MEASURE" else "")
    assert opened(bundle) == "ort-cpu"
    assert measured == []
    assert choice.choices(bundle)["dit"] == Choice(ORT, "not measured yet")


def test_what_was_measured_before_is_used_without_measuring(
    bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RuntimeWarning, match="measured now"):
        opened(bundle)
    monkeypatch.setenv("OMNIPORT_MEASURE", "0")
    assert opened(bundle) == "openvino (dit) + ort-cpu"


def test_a_bad_budget_says_what_was_expected(
    bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("OMNIPORT_MEASURE", given)
        with pytest.raises(UsageError, match=f"OMNIPORT_MEASURE is '{given}'; seconds were expected"):
            opened(bundle)


def test_what_took_too_long_is_tried_again_with_more_time(bundle: Bundle, measured: list[tuple[str, ...]]) -> None:
    file = choice._file(bundle, None, None)
    assert file is not None
    late = GraphTimes(problem="not measured: too long", budget=5.0)
    with file.reserved() as problem:
        assert problem == ""
    file.write({"dit": late, "bigvgan": msgspec.structs.replace(late, budget=4.0), "audio_encoder": SLOW})
    with pytest.warns(RuntimeWarning, match="with bigvgan of"):
        assert opened(bundle) == "ort-cpu"
    assert measured == [("bigvgan",)]


def test_what_was_measured_on_a_busy_machine_is_measured_again_on_a_quieter_one(
    bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quieter measurement is kept; a machine that is never quiet is not measured for ever."""
    shares = {"measured": 0.6, "now": 0.5}
    monkeypatch.setattr(choice, "_is_busy", lambda: shares["now"] >= choice.BUSY)
    quiet = choice.measure

    def measure(*arguments: Any) -> Mapping[str, Any]:
        found = quiet(*arguments)
        return {name: msgspec.structs.replace(times, busy=shares["measured"]) for name, times in found.items()}

    monkeypatch.setattr(choice, "measure", measure)
    file = choice._file(bundle, None, None)
    assert file is not None
    wrong, broken = msgspec.structs.replace(SLOW, busy=0.7), GraphTimes(problem="it is broken", busy=0.7)
    with file.reserved():
        file.write({"dit": wrong, "bigvgan": QUICK, "audio_encoder": broken})
    assert opened(bundle) == "openvino (bigvgan) + ort-cpu"
    assert measured == [], "the machine is busy still"
    shares["now"] = 0.0
    with pytest.warns(RuntimeWarning, match="with dit of"):
        assert opened(bundle) == "openvino (dit, bigvgan) + ort-cpu"
    assert measured == [("dit",)]
    shares["measured"] = 0.9
    with pytest.warns(RuntimeWarning, match="with dit of"):
        opened(bundle)
    assert file.read()["dit"] == msgspec.structs.replace(QUICK, busy=0.6, times=3)
    opened(bundle)
    assert len(measured) == 2, "three measurements are enough"


def test_one_process_measures_at_a_time(
    bundle: Bundle, measured: list[tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = choice._file(bundle, None, None)
    assert file is not None
    with file.reserved() as problem:
        assert problem == ""
        assert opened(bundle) == "ort-cpu"
    assert measured == []
    assert any("another process is measuring it" in message for message in caplog.messages)
    with pytest.warns(RuntimeWarning, match="measured now"):
        assert opened(bundle) == "openvino (dit) + ort-cpu"


def test_a_folder_that_cannot_be_written(
    bundle: Bundle, measured: list[tuple[str, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "cache").write_text("a file")
    assert opened(bundle) == "ort-cpu"
    assert measured == []
    assert any("cannot be written" in message for message in caplog.messages)


def test_only_this_users_own_file_of_the_same_machine_is_believed(bundle: Bundle, measured: list[Any]) -> None:
    file = choice._file(bundle, None, None)
    assert file is not None
    with file.reserved():
        file.write({"dit": QUICK})
    assert file.read() == {"dit": QUICK}
    assert TimesFile(file.path, (*file.made[:-1], "bf16")).read() == {}
    file.path.chmod(0o666)
    assert file.read() == {}
    file.path.chmod(0o600)
    whole = file.path.read_bytes()
    for damaged in (b"", whole[:-9], b"\xff" + whole, whole.replace(b"graph-times", b"something")):
        file.path.write_bytes(damaged)
        assert file.read() == {}


# what is not measured


def test_openvino_runs_what_onnxruntime_cannot(bundle: Bundle, measured: list[tuple[str, ...]], tmp_path: Path) -> None:
    model, spec = plain_model("dit")
    brain = msgspec.structs.replace(spec, precision="bfloat16")
    half = Bundle.open(put_graphs(tmp_path / "half", (model, brain), plain_model("bigvgan")))
    with pytest.warns(RuntimeWarning, match="with bigvgan of"):
        assert opened(half) == "openvino (dit) + ort-cpu"
    assert choice.choices(half)["dit"] == Choice(OPENVINO, "ONNX Runtime has no bfloat16 on a CPU")


def test_one_of_them_alone(bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "openvino_version", lambda: "")
    assert opened(bundle) == "ort-cpu"
    assert choice.choices(bundle)["dit"] == Choice(ORT, "openvino is not installed")
    monkeypatch.setattr(choice, "openvino_version", lambda: "2026.4.1")
    monkeypatch.setattr(choice.packages, "installed", dict)
    monkeypatch.setattr("omniport.runtime.backends.select._cuda_runs", lambda: pytest.fail("nothing to ask"))
    assert opened(bundle) == "openvino"
    assert choice.choices(bundle)["dit"] == Choice(OPENVINO, "onnxruntime is not installed")
    assert measured == []


def test_bfloat16_is_chosen_by_graph_where_it_is_asked_for(
    bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RuntimeWarning, match="measured now"):
        assert opened(bundle, compute="bf16") == "openvino (bfloat16) (dit) + ort-cpu"
    with pytest.warns(RuntimeWarning, match="measured now"):
        assert opened(bundle) == "openvino (dit) + ort-cpu", "what was measured in bfloat16 says nothing of float32"
    monkeypatch.setattr("omniport.runtime.backends.select._cuda_runs", lambda: True)
    with pytest.raises(UsageError, match="takes this machine's GPU, which computes as the bundle's graphs say; bf16"):
        opened(bundle, compute="bf16")


def test_openvino_that_does_not_open_leaves_all_to_onnxruntime(
    bundle: Bundle, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RuntimeWarning, match="measured now"):
        opened(bundle)

    def broken(*_: object) -> OpenVinoBackend:
        raise BackendError("openvino does not import")

    monkeypatch.setattr("omniport.runtime.backends.openvino.backend.OpenVinoBackend", broken)
    with pytest.warns(RuntimeWarning, match="ONNX Runtime runs dit: openvino does not import"):
        assert opened(bundle) == "ort-cpu"


# what is said of it


def test_the_commands_say_what_was_chosen(
    tiny_bundle: Path, measured: list[tuple[str, ...]], omniport: Omniport, tmp_path: Path
) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.warns(RuntimeWarning, match="measured now"):
        opened(bundle)
    why = "OpenVINO takes 1,000.0 ms and ONNX Runtime 1,200.0"
    code, out, _ = omniport("inspect", tiny_bundle, "--json")
    chosen = json.loads(out)["auto_on_cpu"]
    assert code == 0
    assert chosen["dit"] == {"backend": "openvino", "why": why}
    assert {chosen[name]["backend"] for name in bundle.manifest.graphs if name != "dit"} == {"ort-cpu"}
    assert why in omniport("inspect", tiny_bundle)[1]
    (plan,) = json.loads(omniport("plan", tiny_bundle, "--target", "cpu", "--json")[1])
    assert plan["auto_on_cpu"] == chosen
    assert "auto_on_cpu" not in json.loads(omniport("plan", tiny_bundle, "--target", "rtx-4090", "--json")[1])[0]
    assert why in omniport("plan", tiny_bundle, "--target", "cpu")[1]
    facts = json.loads(omniport("doctor", "--json")[1])
    assert facts["auto_on_cpu"].endswith(
        f"OpenVINO 2026.4.1: measured for up to 5 s when a bundle is opened, and kept in {tmp_path}/cache/graph-times"
    )
    assert len(measured) == 1


def test_where_there_is_no_choice_there_is_no_table(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, omniport: Omniport
) -> None:
    monkeypatch.setattr(choice, "openvino_version", lambda: "2026.4.1")
    assert "auto runs it in" in omniport("inspect", tiny_bundle)[1]
    monkeypatch.setattr(choice, "openvino_version", lambda: "")
    assert "auto runs it in" not in omniport("inspect", tiny_bundle)[1]
    assert "auto runs it in" not in omniport("plan", tiny_bundle, "--target", "cpu")[1]


def test_what_a_machine_can_do(measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.packages, "installed", lambda: {"onnxruntime": "1.32.0"})
    monkeypatch.setenv("OMNIPORT_MEASURE", "0")
    assert "where it is quicker, OpenVINO 2026.4.1: as measured before, and kept in" in choice.describe()
    monkeypatch.setenv("OMNIPORT_CACHE", "")
    assert "only where a cache folder keeps the times" in choice.describe()
    monkeypatch.setattr(choice, "openvino_version", lambda: "")
    assert choice.describe() == "ONNX Runtime 1.32.0, the only one"
    monkeypatch.setattr(choice.packages, "installed", dict)
    assert choice.describe() == "nothing"


# the process that measures

BEGIN, DONE = '["dit",null]', '["dit",{"seconds":{"ort-cpu":1.2,"openvino":1.0},"difference":1e-06}]'


@pytest.mark.parametrize(
    ("script", "seconds", "found"),
    [
        (f"echo noise; echo '{BEGIN}'; echo '{DONE}'", 60, {"dit": QUICK}),
        (
            f"echo '{BEGIN}'; exec sleep 600",
            0.5,
            {
                "dit": GraphTimes(
                    problem="not measured: 0.5 s are too few for it (OMNIPORT_MEASURE gives more)", budget=0.5
                )
            },
        ),
        (
            f"echo '{BEGIN}'; echo '{DONE}'; echo '[\"bigvgan\",null]'; echo '[\"bigvgan\",{{'; exec sleep 600",
            5,
            {"dit": QUICK},
        ),
        (
            f'shift 3; case $1 in dit) echo \'{BEGIN}\'; kill -SEGV $$;; esac; echo "[\\"$1\\",{{}}]"',
            60,
            {"dit": GraphTimes(problem="not measured: its process was ended by SIGSEGV"), "bigvgan": GraphTimes()},
        ),
        (
            "echo Traceback >&2; echo 'BundleError: broken' >&2; exit 1",
            60,
            dict.fromkeys(("dit", "bigvgan"), GraphTimes(problem="not measured: BundleError: broken")),
        ),
        (
            "exit 3",
            60,
            dict.fromkeys(("dit", "bigvgan"), GraphTimes(problem="not measured: its process ended with exit code 3")),
        ),
    ],
    ids=["well", "too slow", "the time is up", "a crash", "an error", "without a word"],
)
def test_whatever_becomes_of_the_process_there_is_a_reason(
    script: str, seconds: float, found: Mapping[str, GraphTimes]
) -> None:
    graphs = ("dit",) if "noise" in script else ("dit", "bigvgan")
    assert measuring.measure(Path("b"), graphs, 1, "float32", seconds, ("sh", "-c", script, "sh")) == found


@pytest.mark.parametrize(
    ("command", "reason"), [("", "there is no Python to start"), ("/nowhere/python", "no process can be started")]
)
def test_without_a_process(command: str, reason: str) -> None:
    (found,) = measuring.measure(Path("b"), ("dit",), 1, "float32", 60, (command,)).values()
    assert found.problem.startswith(f"not measured: {reason}")


# with OpenVINO itself, in processes without torch


def test_the_process_measures_both(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: it is published for some machines only")
    found = measuring.measure(tiny_bundle, ("talker", "audio_encoder"), 1, "float32", 900)
    assert list(found) == ["talker", "audio_encoder"]
    for times in found.values():
        assert times.problem == ""
        assert set(times.seconds) == {ORT, OPENVINO}
        assert all(0 < seconds < 100 for seconds in times.seconds.values())
        assert 0 < times.difference < choice.DIFFERENCES["float32"]


MIXED = """
import json, sys, time
import numpy as np
from omniport.runtime import AudioChunk, OmniSession, SamplingConfig
from omniport.runtime.backends.guarded import slots_of
from omniport.runtime.backends.mixed import choice
from omniport.runtime.backends.mixed.graph_times import GraphTimes
from omniport.runtime.bundle.reader import Bundle

bundle = Bundle.open(sys.argv[1])
quick, slow = (GraphTimes(seconds={"ort-cpu": ours, "openvino": 1.0}) for ours in (2.0, 0.5))
file = choice._file(bundle, 2, None)
with file.reserved():
    file.write({name: quick if name in ("talker", "dit") else slow for name in bundle.manifest.graphs})
sound = np.sin(np.arange(24000) / 9).astype(np.float32)
greedy = {who: SamplingConfig(max_new_tokens=n, temperature=0.0) for who, n in (("thinker", 6), ("talker", 12))}
told = []
for name in ("auto", "ort-cpu"):
    with OmniSession.open(bundle.root, name, threads=2) as session:
        said = list(session.reply([{"role": "user", "content": [{"type": "audio", "audio": sound}]}], **greedy))
        begun = time.process_time()
        time.sleep(0.5)
        idle = time.process_time() - begun
        slots = slots_of(session.backend)
        heard = np.concatenate([event.samples for event in said if isinstance(event, AudioChunk)])
        done = said[-1]
        told.append([done.stats.backend, done.token_ids, done.codec_ids, heard.tolist(), idle, slots.count])
        reply = session.reply([{"role": "user", "content": "Hello"}], **greedy)
        next(reply)
        reply.close()
assert "torch" not in sys.modules
print(json.dumps(told))
"""


def test_a_spoken_reply_of_both(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of ONNX Runtime alone; one slot for both, and neither keeps a core busy while nothing runs."""
    pytest.importorskip("openvino", reason="openvino is not installed: it is published for some machines only")
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command = [sys.executable, "-W", "error", "-c", MIXED, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    mixed, plain = msgspec.json.decode(done.stdout)
    assert mixed[0] == "openvino (talker, dit) + ort-cpu"
    assert plain[0] == "ort-cpu"
    assert mixed[1:3] == plain[1:3]
    assert len(mixed[3]) == len(plain[3])
    assert max(abs(a - b) for a, b in zip(mixed[3], plain[3], strict=True)) < 1e-4
    assert max(map(abs, plain[3])) > 1e-2
    assert mixed[4] < 0.2, "seconds of processor time in half a second of doing nothing"
    assert mixed[5] == plain[5]
