"""The command line: exit codes, messages, output formats, and nothing left behind on failure."""

from __future__ import annotations

import argparse
import builtins
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import time
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.cli import main
from omniport.cli.commands import export
from omniport.cli.commands.export import COMPARE_MODULES, EXPORT_MODULES
from omniport.cli.commands.inspect import kv_bytes_per_1k
from omniport.cli.common import require_extra, size_text
from omniport.cli.wav import WavWriter
from omniport.runtime.backends import BACKENDS
from omniport.runtime.errors import CheckFailed, ExportError, UsageError
from omniport.runtime.media.audio import load_audio
from omniport.runtime.system import host
from support.bundles import make_manifest
from support.command_line import Omniport, refused
from support.paths import REPOSITORY

from scripts.sample_media import make_media

COMMANDS = ("make-checkpoint", "export", "inspect", "voices", "run", "talk", "doctor")


@pytest.fixture(scope="module")
def sample_media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A spoken question, a picture and a clip with sound, by kind."""
    return make_media(tmp_path_factory.mktemp("media"))


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_starts_with_a_verb_and_ends_with_an_example_that_parses(omniport: Omniport, command: str) -> None:
    code, out, _ = omniport(command, "--help")
    assert code == 0
    summary = next(line.strip() for line in out.splitlines() if line.startswith("  "))
    assert summary.split()[0] in {"Make", "Export", "Show", "List", "Answer", "Talk", "Report"}
    last = " ".join(out.strip().rpartition("\n\n")[2].split())
    assert last.startswith(f"Example: omniport {command}")


def test_every_command_has_quiet_and_json(omniport: Omniport) -> None:
    _, listing, _ = omniport("--help")
    for command in COMMANDS:
        assert command in listing
        _, out, _ = omniport(command, "--help")
        assert "--json" in out
        assert "--quiet" in out


def test_version(omniport: Omniport) -> None:
    code, out, _ = omniport("--version")
    assert code == 0
    assert out.startswith("omniport 0.")


def test_python_runs_the_package() -> None:
    command = [sys.executable, "-m", "omniport.cli"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("omniport ")
    assert subprocess.run([*command, "no-such-command"], capture_output=True).returncode == 2


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    # processor time of the child, not the clock: the machine may be busy
    script = (
        "import sys; from omniport.cli import main\n"
        "try: main.run(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'msgspec', 'tokenizers', 'torch', 'transformers', 'onnx', 'onnxruntime'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr.strip() == "[]"
    assert min(spent) < 0.5


# errors


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("inspect",), ("voices", "a", "b"), ("run", "b", "--seed", "x")]
)
def test_usage_errors_exit_with_2(omniport: Omniport, arguments: tuple[str, ...]) -> None:
    code, _, err = omniport(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["inspect", "voices", "run"])
def test_a_folder_that_is_no_bundle(omniport: Omniport, tmp_path: Path, command: str) -> None:
    extra = ("--text", "hi") if command == "run" else ()
    refused(omniport(command, tmp_path, *extra), "error: ", "bundle.json", "omniport export")


def test_what_is_no_checkpoint(omniport: Omniport, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(omniport("export", tmp_path / "empty", tmp_path / "out"), "error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_unknown_graph_lists_the_known(omniport: Omniport, tmp_path: Path) -> None:
    refused(omniport("export", "somewhere", tmp_path / "out", "--graphs", "thinker,vocoder"), "vocoder", "bigvgan")


def test_json_and_voice_need_what_they_work_on(omniport: Omniport, tmp_path: Path) -> None:
    refused(omniport("run", tmp_path, "--json"), "--text")
    refused(omniport("run", tmp_path, "--text", "hi", "--voice", "Ethan"), "--speak")


def test_missing_extra_names_the_pip_line(omniport: Omniport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(omniport("export", "somewhere", tmp_path / "out"), "torch", "pip install 'omniport[export]'")


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_bug_exits_with_101_and_keeps_its_traceback(omniport: Omniport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.cli.commands.doctor.examine", raising(RuntimeError("boom")))
    code, _, err = omniport("doctor")
    assert code == main.EXIT_BUG == 101
    assert "Traceback" in err
    assert "RuntimeError: boom" in err
    assert "omniport doctor" in err


def test_a_failed_check_exits_with_1(omniport: Omniport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.cli.commands.doctor.examine", raising(CheckFailed("it did not hold")))
    assert omniport("doctor") == (1, "", "error: it did not hold\n")


def test_interrupt_exits_with_130(omniport: Omniport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.cli.commands.doctor.examine", raising(KeyboardInterrupt()))
    code, _, err = omniport("doctor")
    assert code == main.EXIT_INTERRUPTED == 130
    assert "Traceback" not in err


# make-checkpoint, export


@pytest.mark.slow
def test_make_checkpoint(omniport: Omniport, tmp_path: Path) -> None:
    out = tmp_path / "made"
    code, text, _ = omniport("make-checkpoint", out, "--size", "tiny", "--seed", "3", "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["path"] == str(out)
    assert facts["seed"] == 3
    assert facts["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    refused(omniport("make-checkpoint", out), str(out))


def test_export_again_skips_what_did_not_change(omniport: Omniport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The table and --json say the same; only one graph is made, to be quick."""
    out = tmp_path / "bundle"
    code, text, err = omniport("export", tiny_checkpoint, out, "--graphs", "audio_encoder")
    assert code == 0, err
    assert "audio_encoder" in text
    assert "tracing audio_encoder" in err
    code, text, err = omniport("export", tiny_checkpoint, out, "--graphs", "audio_encoder", "--json")
    assert code == 0, err
    assert err == ""
    (graph,) = json.loads(text)["graphs"]
    assert graph["name"] == "audio_encoder"
    assert graph["skipped"] is True
    assert graph["weight_bytes"] > 0


# inspect, voices, doctor


def test_inspect(omniport: Omniport, tiny_bundle: Path) -> None:
    code, text, _ = omniport("inspect", tiny_bundle, "--verify", "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["verified"] is True
    assert set(facts["graph_bytes"]) == set(facts["manifest"]["graphs"])
    assert all(size > 0 for size in facts["graph_bytes"].values())
    thinker = facts["manifest"]["thinker"]
    expected = thinker["num_layers"] * 2 * thinker["num_kv_heads"] * thinker["head_dim"] * 4 * 1000
    assert facts["kv_bytes_per_1k_tokens"]["thinker"] == expected
    code, text, _ = omniport("inspect", tiny_bundle)
    assert code == 0
    for word in ("mel float32 [chunks,128,200]", "past_key_* float32", "Chelsie", "per 1,000 tokens"):
        assert word in text


def test_kv_memory_of_the_3b_thinker() -> None:
    import msgspec

    geometry = msgspec.structs.replace(make_manifest().thinker, num_layers=36, num_kv_heads=2, head_dim=128)
    assert kv_bytes_per_1k(geometry, "float16") == 36_864_000


def test_inspect_verify_finds_a_changed_byte(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    tokenizer = copy / "tokenizer.json"
    content = bytearray(tokenizer.read_bytes())
    content[-2] ^= 1
    tokenizer.write_bytes(content)
    refused(omniport("inspect", copy, "--verify"), "tokenizer.json", "sha256")


def test_voices(omniport: Omniport, tiny_bundle: Path) -> None:
    code, text, _ = omniport("voices", tiny_bundle)
    assert code == 0
    assert text.split() == ["Chelsie", "Ethan"]
    code, text, _ = omniport("voices", tiny_bundle, "--json")
    assert [(voice["name"], voice["default"]) for voice in json.loads(text)] == [("Chelsie", True), ("Ethan", False)]


def test_doctor(omniport: Omniport) -> None:
    code, text, _ = omniport("doctor", "--json")
    facts = json.loads(text)
    assert code == 0
    assert facts["memory_bytes"] > 0
    assert facts["packages"]["numpy"] == np.__version__
    assert {row["name"] for row in facts["backends"]} == set(BACKENDS) - {"auto"}
    code, text, _ = omniport("doctor")
    assert code == 0
    assert "onnxruntime" in text


def test_doctor_says_what_to_install_and_exits_with_1_when_nothing_can_run(
    omniport: Omniport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omniport.cli.commands.doctor._version", lambda names: None)
    code, text, err = omniport("doctor")
    assert code == 1
    assert "pip install 'omniport[ort]'" in text
    assert "pip install 'omniport[media]'" in text
    assert "Traceback" not in err


def test_doctor_asks_the_driver_and_not_nvidia_smi(
    omniport: Omniport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Jetson's container: nvidia-smi is missing, or knows nothing."""
    orin = host.Gpu("Orin", "8.7", 8 << 30, True, 0.0)
    monkeypatch.setattr(host, "read_gpus", lambda: [orin])
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = []
    for _ in range(2):
        facts = json.loads(omniport("doctor", "--json")[1])
        rows.append(facts["gpus"])
        assert all("no NVIDIA GPU" not in (row["why_not"] or "") for row in facts["backends"])
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '[N/A]'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    row = {"name": "Orin", "driver_version": "unknown", "memory.total": "8192 MiB", "compute_cap": "8.7"}
    assert rows == [[row], [row]]


def test_doctor_says_where_the_builder_of_engines_is(omniport: Omniport, monkeypatch: pytest.MonkeyPatch) -> None:
    """By compute capability: the packages of TensorRT on the usual index hold no libraries."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("omniport.cli.commands.doctor._version", lambda names: None)
    for capability, line in (
        ("8.9", "pip install 'omniport[rtx]'"),
        ("9.0", "pip install 'omniport[trt]' --extra-index-url https://pypi.nvidia.com"),
    ):
        monkeypatch.setattr(host, "gpu_capability", lambda capability=capability: capability)
        rows = json.loads(omniport("doctor", "--json")[1])["abilities"]
        (row,) = (row for row in rows if row["name"].startswith("run engines"))
        assert not row["ready"]
        assert row["install"].startswith(line)


def test_doctor_says_that_two_packages_overwrite_each_other(
    omniport: Omniport, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads(omniport("doctor", "--json")[1])
    assert facts["conflicts"] == []
    monkeypatch.setattr("omniport.cli.commands.doctor._version", lambda names: "1.31.1")
    (said,) = json.loads(omniport("doctor", "--json")[1])["conflicts"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'omniport[ort" in said
    assert "overwrite each other" in omniport("doctor")[1]


def test_comparing_wants_the_onnxruntime_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for capability, extra in ((None, "ort"), ("8.9", "ort-gpu")):
        monkeypatch.setattr(host, "gpu_capability", lambda capability=capability: capability)
        with pytest.raises(ExportError, match=rf"needs onnxruntime, .*'omniport\[{extra}\]'$"):
            require_extra("export", *COMPARE_MODULES)
        require_extra("export", *EXPORT_MODULES)


def test_doctor_never_imports_torch() -> None:
    script = (
        "import sys; from omniport.cli.commands.doctor import examine; facts = examine()\n"
        "assert facts['packages']['torch'], 'torch is installed here'\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# run


def wav_facts(path: Path) -> tuple[int, int, float]:
    """(sample rate, samples, RMS) of a PCM16 mono file."""
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        return file.getframerate(), samples.size, float(np.sqrt(np.mean(samples**2)))


SHORT = ("--max-new-tokens", "4", "--max-speech", "0.6", "--greedy")


def test_run_json_events_and_speech(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "reply.wav"
    code, text, err = omniport("run", tiny_bundle, "--text", "Hello", "--speak", out, "--json", *SHORT)
    assert code == 0, err
    events = [json.loads(line) for line in text.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "done"
    assert kinds.count("done") == 1
    done = events[-1]
    assert done["text"] == "".join(event["text"] for event in events if event["event"] == "text_delta")
    assert 1 <= len(done["token_ids"]) <= 4
    assert 1 <= len(done["codec_ids"]) <= 30
    chunks = [event for event in events if event["event"] == "audio_chunk"]
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
    rate, samples, rms = wav_facts(out)
    assert rate == 24000
    assert samples == sum(chunk["samples"] for chunk in chunks) == 480 * len(done["codec_ids"])
    assert rms > 1e-3
    assert done["wav"] == str(out)
    assert done["stats"]["time_to_first_audio"] > 0
    assert list(tmp_path.iterdir()) == [out]


def test_run_text_only_prints_text_and_a_summary(omniport: Omniport, tiny_bundle: Path) -> None:
    code, text, err = omniport("run", tiny_bundle, "--text", "Hello", *SHORT)
    assert code == 0
    assert text.endswith("\n")
    assert "TTFT" in err
    assert "TTFA" not in err
    code, again, err = omniport("run", tiny_bundle, "--text", "Hello", "--quiet", *SHORT)
    assert (code, again, err) == (0, text, "")


def test_say_speaks_a_given_text(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "said.wav", "The train leaves at noon."
    code, shown, err = omniport("say", tiny_bundle, text, "--speak", out, "--json", "--greedy", "--max-speech", 0.6)
    assert code == 0, err
    done = json.loads(shown.splitlines()[-1])
    assert (done["event"], done["text"], done["wav"]) == ("done", text, str(out))
    rate, samples, rms = wav_facts(out)
    assert (rate, samples) == (24000, 480 * len(done["codec_ids"]))
    assert rms > 1e-3
    other = tmp_path / "other.wav"
    refused(omniport("say", tiny_bundle, " ", "--speak", other), "empty")
    refused(omniport("say", tiny_bundle, "a<|im_end|>", "--speak", other), "control token")
    refused(omniport("say", tiny_bundle, text, "--speak", other, "--voice", "Nobody"), "Nobody")
    assert list(tmp_path.iterdir()) == [out]


def test_run_takes_every_medium(omniport: Omniport, tiny_bundle: Path, sample_media: dict[str, Path]) -> None:
    media = [word for kind in ("audio", "image", "video") for word in (f"--{kind}", sample_media[kind])]
    prompts = []
    for sound in ("--use-audio-in-video", "--no-use-audio-in-video"):
        code, text, err = omniport("run", tiny_bundle, *media, sound, "--text", "So?", "--json", *SHORT)
        assert code == 0, err
        prompts.append(json.loads(text.splitlines()[-1])["stats"]["prompt_tokens"])
    # five seconds of sound are 125 audio tokens
    assert prompts[0] - prompts[1] >= 125


def test_run_bounds_pixels_and_frames(omniport: Omniport, tiny_bundle: Path, sample_media: dict[str, Path]) -> None:
    def prompt(*words: object) -> int:
        code, text, err = omniport("run", tiny_bundle, "--text", "So?", "--json", *SHORT, *words)
        assert code == 0, err
        return int(json.loads(text.splitlines()[-1])["stats"]["prompt_tokens"])

    text = prompt()
    image = prompt("--image", sample_media["image"]) - text
    assert 4 < prompt("--image", sample_media["image"], "--max-pixels", 3136) - text < image
    video = ("--video", sample_media["video"], "--no-use-audio-in-video")
    whole = prompt(*video) - text
    assert prompt(*video, "--max-frames", 4) - text < whole / 2
    assert prompt(*video, "--fps", 0.5) - text < whole / 2
    for words, problem in (
        (("--max-pixels", 10), "784"),
        (("--fps", "nan"), "not in the range 0.001 to 1e+09"),
        (("--max-frames", 1), "greater than or equal to 2"),
    ):
        refused(omniport("run", tiny_bundle, *video, *words), problem)


def test_run_refuses_bad_input_and_leaves_nothing(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "reply.wav"
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"neither sound nor picture")
    text = ("--text", "hi")
    refused(omniport("run", tiny_bundle, *text, "--speak", out, "--voice", "Nobody"), "Nobody", "Chelsie", "Ethan")
    for kind in ("audio", "image", "video"):
        refused(omniport("run", tiny_bundle, f"--{kind}", bad, "--speak", out), "error: ")
        refused(omniport("run", tiny_bundle, f"--{kind}", tmp_path / "none", "--speak", out), "none")
    refused(omniport("run", tiny_bundle, *text, "--speak", tmp_path / "no" / "reply.wav"), "reply.wav")
    refused(omniport("run", tiny_bundle, *text, "--speak", tmp_path), "folder")
    refused(omniport("run", tiny_bundle, *text, "--backend", "tensorrt"), "omniport[trt]")
    assert list(tmp_path.iterdir()) == [bad]


def test_conversation_keeps_its_messages(
    omniport: Omniport,
    tiny_bundle: Path,
    sample_media: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(
        [
            "Hello",
            f"/image {sample_media['image']}",
            "",
            "/audio nowhere.wav",
            "/what",
            "And now?",
            "/clear",
            "Hello",
            "/quit",
        ]
    )
    monkeypatch.setattr(builtins, "input", lambda *_: next(lines))
    speak = ("--speak", tmp_path / "reply.wav", "--max-speech", "0.3")
    code, text, err = omniport("run", tiny_bundle, "--max-new-tokens", "3", "--greedy", *speak)
    assert code == 0, err
    prompts = [int(line.split(" prompt tokens")[0].split()[-1]) for line in err.splitlines() if "prompt tokens" in line]
    assert len(prompts) == 4
    assert prompts[0] < prompts[1] < prompts[2]
    assert prompts[3] == prompts[0]
    assert "no such file: nowhere.wav" in err
    assert "not understood: /what" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"reply-{turn}.wav" for turn in (1, 2, 3, 4)]
    assert len(text.splitlines()) >= 4


def test_without_a_stdin_there_is_no_conversation(
    omniport: Omniport, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # as in a service
    refused(omniport("run", tiny_bundle), "stdin cannot be read", "--text")


def test_conversation_survives_a_bad_turn_and_ends_with_stdin(
    omniport: Omniport, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    lines = iter([f"/image {bad}", "What is this?", "Hello"])

    def read(*_: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    code, _, err = omniport("run", tiny_bundle, "--max-new-tokens", "2")
    assert code == 0
    assert "error: " in err
    assert err.count("prompt tokens") == 1


def test_terminated_run_leaves_no_partial_wav(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "reply.wav"
    command = [sys.executable, "-c", "from omniport.cli.main import run; run()", "run", str(tiny_bundle)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*command, "--text", "Hello", "--speak", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    with child:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".reply.wav.*.partial")):
            assert child.poll() is None, child.stderr and child.stderr.read()
            assert time.monotonic() < deadline, "the reply never began"
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == main.EXIT_TERMINATED == 143
    assert list(tmp_path.iterdir()) == []


# the WAV writer


def test_wav_writer_clips_rounds_and_renames(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with WavWriter(path, 24000) as writer:
        writer.write(np.array([0.0, 0.5, 1.0, 2.0, -2.0], np.float32))
        assert not path.exists()
        writer.write(np.array([-0.5], np.float32))
    with wave.open(str(path), "rb") as file:
        assert (file.getframerate(), file.getnframes()) == (24000, 6)
        assert np.frombuffer(file.readframes(6), "<i2").tolist() == [0, 16384, 32767, 32767, -32767, -16384]
    assert list(tmp_path.iterdir()) == [path]


def test_wav_writer_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")

    def fail_midway() -> None:
        with WavWriter(path, 24000) as writer:
            writer.write(np.ones(8, np.float32))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_wav_writer_without_a_sample_is_a_valid_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with WavWriter(path, 16000):
        pass
    with wave.open(str(path), "rb") as file:
        assert (file.getframerate(), file.getnframes()) == (16000, 0)


def test_speech_into_a_pipe_is_a_wav_of_unknown_length(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with WavWriter(pipe, 24000) as writer:
            writer.write(np.full(8, 0.5, np.float32))
        heard = os.read(reader, 1000)
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert heard[:4] == b"RIFF"
    assert np.frombuffer(heard[44:], "<i2").tolist() == [16384] * 8
    assert load_audio(heard, 24000).shape == (8,), "lengths that nobody can know are read as the rest of the file"


@pytest.mark.parametrize("name", ["reply.mp3", "reply.FLAC", "reply.opus"])
def test_a_name_that_promises_another_format_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"speech is written as WAV"), WavWriter(tmp_path / name, 24000):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "samples"), [(20_000, 1 << 20), (20, 8)], ids=["while writing", "at the end"])
def test_wav_writer_when_the_disk_takes_no_more(tmp_path: Path, limit: int, samples: int) -> None:
    """The operating system refuses to let the file grow, as on a full disk."""

    def write() -> None:
        with WavWriter(tmp_path / "a.wav", 24000) as writer:
            writer.write(np.ones(samples, np.float32))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (1500, "1.5 kB"), (25_300_000_000, "25.3 GB")])
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


# optimum


@pytest.mark.slow
def test_wheel_adds_the_optimum_sub_command(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} cannot build this project: 77 or newer is needed")
    import shutil

    # a copy: building writes build/ and egg-info, which belong in no working tree
    source = tmp_path / "source"
    names = ("export", "runtime", "calib", "cli", "serve", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run([*build, str(source)], check=True, capture_output=True, text=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "optimum/commands/register/register_omniport.py" in listed
    templates = [path.relative_to(REPOSITORY) for path in REPOSITORY.glob("*/*/templates/*")]
    assert len(templates) == 6
    assert {f"omniport/{path.as_posix()}" for path in templates} <= set(listed)
    page = [path.relative_to(REPOSITORY) for path in REPOSITORY.glob("serve/page/static/*")]
    assert page
    assert {f"omniport/{path.as_posix()}" for path in page} <= set(listed)
    assert not [name for name in listed if name.startswith("optimum/") and name.endswith("__init__.py")]
    assert {name.split("/")[0] for name in listed if ".dist-info" not in name} == {"omniport", "optimum"}

    # without the finder of an editable install, which would register the command a second time
    script = (
        "import sys\n"
        "sys.path[:] = [path for path in sys.path if '__editable__' not in path]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "import omniport.cli.main as ours\n"
        f"assert ours.__file__.startswith({str(tmp_path)!r}), ours.__file__\n"
        "from optimum.commands.optimum_cli import main\n"
        "main()"
    )

    def optimum(*arguments: object) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", script, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    assert "omniport" in optimum("export", "--help").stdout
    help_text = optimum("export", "omniport", "--help").stdout
    for word in ("checkpoint", "--precision", "--graphs", "--max-context", "optimum-cli export omniport Qwen/"):
        assert word in help_text
    # the run goes through omniport's own command: its messages, its exit codes
    failed = optimum("export", "omniport", tmp_path / "nothing", tmp_path / "out", "--graphs", "vocoder")
    assert failed.returncode == 2
    assert "no graph named vocoder" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_the_optimum_sub_command_hands_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    register = pytest.importorskip("optimum.commands.register.register_omniport")
    parser = argparse.ArgumentParser()
    register.OmniportExportCommand.parse_args(parser)
    ours = set(inspect.signature(export.command).parameters)
    assert {action.dest for action in parser._actions} == ours | {"help"}
    calls: list[list[str]] = []
    monkeypatch.setattr(main, "run", calls.append)
    line = (
        "model out --precision fp16 --graphs dit --max-context 64 --ops decomposed --kv concat --keep-fp32 a.* "
        "--keep-fp32 b --ranges r.json --zero-points separate --max-pixels 784 --fps 0.5 --max-frames 8 --json --quiet"
    )
    for arguments in (line.split(), ["model", "out"]):
        command = register.OmniportExportCommand.__new__(register.OmniportExportCommand)
        command.args = parser.parse_args(arguments)
        command.run()
    assert calls[0] == [
        "export",
        *("--precision=fp16", "--graphs=dit", "--max-context=64", "--ops=decomposed", "--kv=concat", "--keep-fp32=a.*"),
        *("--keep-fp32=b", "--ranges=r.json", "--zero-points=separate", "--max-pixels=784", "--fps=0.5"),
        *("--max-frames=8", "--json", "--quiet", "--", "model", "out"),
    ]
    assert calls[1] == ["export", "--", "model", "out"]
