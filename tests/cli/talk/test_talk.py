"""The loop of ``omniport talk``: sound keeps a device's time, turns are found and interrupted, the views show them."""

from __future__ import annotations

import functools
import io
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from omniport.cli.talk import loop as talk_loop
from omniport.cli.talk.loop import PushToTalk, Stage, Talk, read_keys
from omniport.cli.talk.playback import Playback, WavLoudspeaker, WavMicrophone
from omniport.cli.talk.view import JsonView, LiveView, PlainView, Scene, latencies, render
from omniport.runtime import (
    AudioChunk,
    Dialogue,
    Done,
    HandsFree,
    PromptTooLong,
    SamplingConfig,
    Stats,
    TextDelta,
    TurnBegan,
    TurnCommitted,
    TurnsDropped,
)
from rich.console import Console
from support.bundles import make_bundle
from support.live_turns import Live
from support.sound import read_speech, tone

Samples = NDArray[np.float32]
pytestmark = pytest.mark.usefixtures("no_thread_is_left")
LONG = SamplingConfig(max_new_tokens=700)
TEXT = "the quick brown fox"
CODES = [k % 48 for k in range(15 * len(TEXT))]


# --- playback -----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_playback_gives_samples_once_and_silence_between() -> None:
    waiting = Playback()
    waiting.play(np.ones(5, np.float32))  # before a reply has begun: what is left of one that was cut
    waiting.begin()
    waiting.play(np.arange(1, 6, dtype=np.float32))
    waiting.play(np.arange(6, 8, dtype=np.float32))
    assert waiting.take(3).tolist() == [1, 2, 3]
    assert (waiting.played, waiting.waiting) == (3, 4)
    assert waiting.take(6).tolist() == [4, 5, 6, 7, 0, 0]
    assert (waiting.played, waiting.waiting) == (7, 0)
    waiting.play(np.ones(4, np.float32))
    waiting.stop()
    waiting.play(np.ones(4, np.float32))
    assert waiting.take(2).tolist() == [0, 0]
    assert waiting.played == 7, "still known when the reply is cut"
    waiting.begin()
    assert (waiting.played, waiting.waiting) == (0, 0)


def test_a_file_keeps_the_time_of_a_loudspeaker(tmp_path: Path) -> None:
    clock = Clock()
    with WavLoudspeaker(tmp_path / "out.wav", 1000, clock) as speaker:
        clock.now += 5  # loading takes its time; the file begins with the microphone
        speaker.start()
        clock.now += 0.5
        speaker.begin()
        speaker.play(np.full(200, 0.5, np.float32))
        clock.now += 0.1
        assert speaker.heard() == pytest.approx(0.1)
        speaker.play(np.full(100, 0.25, np.float32))  # in time: it follows without a gap
        clock.now += 0.3
        assert speaker.heard() == pytest.approx(0.3)
        speaker.play(np.full(300, 0.75, np.float32))  # late: there is a gap
        clock.now += 0.1
        speaker.stop()
        speaker.play(np.ones(50, np.float32))
        assert speaker.heard() == pytest.approx(0.4)
        clock.now += 0.2
        speaker.begin()
        assert speaker.heard() == 0
        speaker.play(np.full(100, -0.5, np.float32))
        speaker.drain()
        assert not (tmp_path / "out.wav").exists()
    samples, rate = soundfile.read(tmp_path / "out.wav")
    steps = [(500, 0), (200, 0.5), (100, 0.25), (100, 0), (100, 0.75), (200, 0), (100, -0.5)]
    assert rate == 1000
    np.testing.assert_allclose(samples, np.concatenate([np.full(n, v) for n, v in steps]), atol=1e-4)


def test_a_recording_comes_in_real_time_and_can_be_stopped() -> None:
    samples = tone(0.5)
    microphone = WavMicrophone(samples, 16000)
    begun, heard = time.perf_counter(), []
    for block in microphone.blocks():
        heard.append(block)
        assert time.perf_counter() - begun >= sum(map(len, heard)) / 16000 - 1e-3, "nothing is heard before it is said"
    np.testing.assert_array_equal(np.concatenate(heard), samples)
    assert {len(block) for block in heard[:-1]} == {512}
    microphone.stop()
    assert list(microphone.blocks()) == []


# --- the loop, over fake graphs -----------------------------------------------------------------------------------


class Board:
    """A view that remembers."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.levels: list[tuple[float, str, float]] = []
        self.problems: list[str] = []

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ready(self, facts: dict[str, Any], hint: str) -> None: ...

    def level(self, rms: float, state: str, seconds: float) -> None:
        self.levels.append((rms, state, seconds))

    def event(self, event: Any) -> None:
        self.events.append(event)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def names(self) -> list[str]:
        return [type(e).__name__ for e in self.events if not isinstance(e, (TextDelta, AudioChunk))]

    def done(self) -> list[Done]:
        return [e for e in self.events if isinstance(e, Done)]


class Loudness:
    def __call__(self, samples: Samples) -> float:
        return float(np.abs(samples).max() > 0.02)

    def reset(self) -> None: ...


class Script:
    """A microphone that gives blocks and does things between them."""

    sample_rate = 16000.0

    def __init__(self, *steps: Any) -> None:
        self.steps, self.stopped = steps, False

    def blocks(self) -> Iterator[Samples]:
        for step in self.steps:
            if self.stopped:
                return
            if callable(step):
                step()
            else:
                yield from np.array_split(step, max(1, len(step) // 512))

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(make_bundle(tmp_path / "bundle"))
    made.script("the quick brown fox", [*CODES, 52])
    return made


QUIET = np.zeros(16000, np.float32)


def test_speech_cuts_what_is_played_and_the_conversation_knows(live: Live, tmp_path: Path) -> None:
    """All sound is made at once, and three tenths of a second of it were played when the user speaks again."""
    board, clock = Board(), Clock()
    holding = threading.Event()

    class Held(Board):
        def event(self, event: Any) -> None:
            board.event(event)
            if isinstance(event, AudioChunk) and event.index == 2 and len(board.done()) == 0:
                holding.set()
                while not any(e.interrupted for e in board.events if isinstance(e, TurnBegan)):
                    time.sleep(0.001)

    with WavLoudspeaker(tmp_path / "out.wav", 24000, clock) as speaker:
        stage = Stage(speaker, Held())
        with Dialogue(live.session, stage.event, thinker=LONG, talker=LONG, heard=speaker.heard) as dialogue:

            def tick(seconds: float) -> Callable[[], None]:
                def act() -> None:
                    clock.now += seconds

                return act

            def interrupt() -> None:
                assert holding.wait(20)
                clock.now += 0.3

            script = Script(tone(1.0), QUIET, interrupt, tone(1.0), tick(0.7), QUIET)
            Talk(HandsFree(dialogue, vad=Loudness()), script, speaker, board, lasting=False).run()
    assert board.names() == ["TurnBegan", "TurnCommitted", "TurnBegan", "Done", "TurnCommitted", "Done"]
    cut, full = board.done()
    assert (cut.finish_reason, full.finish_reason) == ("cancelled", "stop")
    assert cut.text == "the quick brown fox"[: int(0.3 * 50 / 15)], "15 codes are taken for a token"
    assert full.text == "the quick brown fox"
    sound = read_speech(tmp_path / "out.wav")
    assert len(sound) == (0.3 + 0.7) * 24000 + len(CODES) * 480
    assert np.abs(sound[: round(0.3 * 24000)]).max() > 0.01
    assert not sound[round(0.3 * 24000) : round(1.0 * 24000)].any(), "silent from the moment of the interruption on"
    assert {state for _, state, _ in board.levels} == {"waiting", "listening", "replying"}
    assert max(rms for rms, _, _ in board.levels) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)
    assert max(seconds for _, _, seconds in board.levels) == pytest.approx(1.92, abs=0.01), "pre-roll, speech, silence"


def test_enter_begins_ends_and_interrupts(live: Live) -> None:
    board = Board()
    keys: queue.SimpleQueue[str] = queue.SimpleQueue()
    enter, leave = (functools.partial(keys.put, key) for key in ("enter", "quit"))
    with Dialogue(live.session, Stage(None, board).event, speak=False, thinker=LONG) as dialogue:
        script = Script(
            tone(1.0), enter, tone(0.5), enter, QUIET, lambda: dialogue.wait(), enter, tone(0.2), leave, QUIET, QUIET
        )
        ears = PushToTalk(dialogue, keys, script.stop)
        Talk(ears, script, None, board, lasting=True).run()
        assert script.stopped
    assert board.names() == ["TurnBegan", "TurnCommitted", "Done", "TurnBegan"], "a turn that q ends is not answered"
    assert board.events[0].time == pytest.approx(1.0, abs=0.05)
    committed = next(e for e in board.events if isinstance(e, TurnCommitted))
    assert committed.seconds == pytest.approx(0.5, abs=0.05)
    assert board.problems == []


def test_a_turn_that_fails_does_not_end_a_talk_by_microphone(tmp_path: Path) -> None:
    live = Live(make_bundle(tmp_path / "bundle", max_context=200))
    live.script("ok", [1, 52])
    for lasting in (True, False):
        board = Board()
        with Dialogue(live.session, Stage(None, board).event, speak=False) as dialogue:
            script = Script(tone(12.0), QUIET, dialogue.wait, tone(0.5), QUIET)
            talk = Talk(HandsFree(dialogue, vad=Loudness()), script, None, board, lasting)
            if lasting:
                talk.run()
                assert len(board.problems) == 1
                assert [done.text for done in board.done()] == ["ok", "ok"], (
                    "the rest of what was too long, and the next"
                )
            else:
                with pytest.raises(PromptTooLong):
                    talk.run()


def test_what_fails_again_and_again_ends_it(live: Live) -> None:
    board = Board()
    with Dialogue(live.session, Stage(None, board).event, speak=False) as dialogue:
        script = Script(np.full(16000, np.nan, np.float32))
        with pytest.raises(Exception, match="NaN"):
            Talk(HandsFree(dialogue, vad=Loudness()), script, None, board, lasting=True).run()
    assert len(board.problems) == 1


def test_keys_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talk_loop.sys, "stdin", io.StringIO("\n\nq\n\n"))
    keys = read_keys()
    assert [keys.get(timeout=5) for _ in range(3)] == ["enter", "enter", "quit"]
    assert keys.empty()


# --- views --------------------------------------------------------------------------------------------------------

STATS = Stats(
    backend="fake",
    prompt_tokens=90,
    prefilled_tokens=80,
    late_tokens=12,
    audio_seconds=2.0,
    time_to_first_token=0.21,
    time_to_first_audio=0.43,
    total_time=1.1,
    real_time_factor=0.55,
    underruns=2,
    underrun_seconds=0.3,
    busy={"audio_encoder": 0.125, "prefill": 0.25},
)
STORY: list[Any] = [
    TurnBegan(1.0, False),
    TurnCommitted(3.5, 2.5),
    TurnsDropped(2, 40),
    TextDelta("Hello [red]", 1, 0.2),
    TextDelta("you", 2, 0.3),
    AudioChunk(np.zeros(12000, np.float32), 24000, 0, 0.4),
    Done("Hello [red]you", [1, 2], [3], STATS),
    TurnBegan(9.0, True),
    TurnCommitted(9.5, 0.5),
    Done("Hel", [1], [], Stats(), "cancelled", "cancelled"),
]


def test_latencies_name_every_stage() -> None:
    rows = dict(latencies(STATS))
    assert rows == {
        "encode": "0.12 s",
        "prefill": "0.25 s, 12 of 80 late",
        "TTFT": "0.21 s",
        "TTFA": "0.43 s",
        "RTF": "0.55",
        "underruns": "2, 0.30 s",
        "in all": "1.10 s",
    }
    assert "RTF" not in dict(latencies(Stats()))


def test_the_panel(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(scene: Scene) -> str:
        console = Console(record=True, width=110, file=io.StringIO())
        console.print(render(scene))
        return console.export_text()

    first = shown(Scene(title="bundle  Chelsie  ort-cpu", hint="speak"))
    assert "bundle  Chelsie  ort-cpu" in first
    assert "speak" in first
    assert "waiting" in first
    assert "█" not in first
    assert "TTFT" not in first
    text = shown(Scene("t", "speak", "replying", 0.1, 2.5, "Hello [red] you", 0.5, STATS))
    for word in ("replying", "heard   2.5 s", "said   0.5 s", "Hello [red] you", "TTFA", "0.43 s", "2, 0.30 s"):
        assert word in text
    assert "speak" not in text
    assert text.count("█") == 16, "-20 dB are two thirds of the way from -60 dB"
    assert "..." not in shown(Scene(said="x" * 5000)), "the end of a long reply is shown"


def test_the_live_view_in_a_terminal() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, force_terminal=True, width=100, height=30)) as view:
        view.ready({"bundle": "b", "voice": None, "backend": "fake"}, "speak")
        for event in STORY:
            view.event(event)
            view.level(0.2, "listening", 1.0)
        view.problem("too [bold]long")
        time.sleep(0.3)
    text = out.getvalue()
    for word in ("2.5 s of speech", "Hello [red]you", "Hel ... (cut off)", "oldest turns", "too [bold]long", "b  fake"):
        assert word in text
    assert text.endswith("\x1b[2K"), "the panel is gone"


def test_keys_do_not_show_while_the_view_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    with open(theirs, encoding="utf-8") as terminal, open(ours, "rb", buffering=0):
        monkeypatch.setattr(sys, "stdin", terminal)
        before = termios.tcgetattr(theirs)
        with LiveView(Console(file=io.StringIO(), force_terminal=True)):
            assert before[3] & termios.ECHO
            assert not termios.tcgetattr(theirs)[3] & termios.ECHO
            assert termios.tcgetattr(theirs)[3] & termios.ISIG, "Ctrl-C still works"
        assert termios.tcgetattr(theirs) == before


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with PlainView(quiet) as view:
            view.ready({}, "speak")
            for event in STORY:
                view.event(event)
                view.level(0.2, "listening", 1.0)
            view.problem("too long")
        out, err = capsys.readouterr()
        assert out == "Hello [red]you\n\n"
        lines = err.splitlines()
        assert bool(lines) != quiet
        if not quiet:
            assert lines[0] == "speak"
            assert lines[2] == "3.5 s: heard 2.5 s"
            assert "TTFA 0.43 s" in lines[4]
            assert "cut off" in lines[5]
            assert lines[-1] == "error: too long"


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with JsonView(clock) as view:
        view.ready({"voice": "Chelsie"}, "speak")
        clock.now += 1.5
        for event in STORY:
            view.event(event)
        view.problem("too long")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[0] == {"event": "ready", "at": 0.0, "voice": "Chelsie"}
    assert told[1] == {"event": "turn_began", "at": 1.5, "time": 1.0, "interrupted": False}
    assert told[6] == {
        "event": "audio_chunk",
        "at": 1.5,
        "index": 0,
        "samples": 12000,
        "sample_rate": 24000,
        "time": 0.4,
    }
    assert told[7]["stats"]["time_to_first_audio"] == 0.43
    names = ["ready", "turn_began", "turn_committed", "turns_dropped", "text_delta", "text_delta", "audio_chunk"]
    names += ["done", "turn_began", "turn_committed", "done", "error"]
    assert [line["event"] for line in told] == names
