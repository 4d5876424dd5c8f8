"""Turns that are spoken: committed by hand or by silence, cut off, and what was heard of a reply."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
import pytest
from omniport.runtime import OmniSession
from omniport.serve.realtime import voice_activity
from omniport.serve.realtime.input_buffer import InputBuffer
from support.live_turns import held, voice
from support.loudness import Loudness
from support.realtime import CODES, SAID, ask, connected, kinds, pcm, until, write
from support.served import Served
from websockets.exceptions import ConnectionClosed

RATE = 24000
SILENT = np.zeros(RATE, np.float32)
BY_HAND = {"audio": {"input": {"turn_detection": None}}}


@pytest.fixture(autouse=True)
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voice_activity, "SileroVad", Loudness)
    served.live.script(SAID)


def test_a_turn_by_hand(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        for piece in np.split(voice(2.5, RATE), 25):
            connection.input_audio_buffer.append(audio=pcm(piece))
        connection.input_audio_buffer.commit()
        connection.response.create()
        came = until(connection, "rate_limits.updated")
        assert kinds(came)[:4] == [
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
        ]
        assert came[0].item_id == came[1].item.id
        assert came[-2].response.usage.input_token_details.audio_tokens == 62
        connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
        connection.input_audio_buffer.clear()
        until(connection, "input_audio_buffer.cleared")
        connection.input_audio_buffer.commit()
        assert until(connection, "error")[-1].error.code == "input_audio_buffer_commit_empty"


def test_small_pieces_of_sound_go_into_the_turn_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[float] = []
    advance = InputBuffer.advance

    def counted(buffer: InputBuffer) -> None:
        advanced.append(buffer.waiting)
        advance(buffer)

    monkeypatch.setattr(InputBuffer, "advance", counted)
    with connected(served, **BY_HAND) as connection:
        for piece in np.split(voice(2.5, RATE), 125):
            connection.input_audio_buffer.append(audio=pcm(piece))
        connection.input_audio_buffer.commit()
        connection.response.create()
        done = until(connection, "response.done")[-1]
    assert done.response.usage.input_token_details.audio_tokens == 62
    assert sum(advanced) == pytest.approx(2.5)
    assert 10 <= len(advanced) <= 14


def test_silence_ends_a_turn(served: Served) -> None:
    with connected(served) as connection:
        for samples in (SILENT, voice(1.0, RATE), SILENT):
            connection.input_audio_buffer.append(audio=pcm(samples))
        came = until(connection, "rate_limits.updated")
        assert kinds(came)[:6] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
        ]
        assert came[0].audio_start_ms == pytest.approx(700, abs=70)
        assert came[1].audio_end_ms == pytest.approx(2500, abs=70)
        assert len({came[i].item_id for i in range(3)} | {came[3].item.id}) == 1
        assert came[-2].response.status == "completed"


def test_speech_cuts_a_reply_off(served: Served) -> None:
    with connected(served) as connection:
        with held(served.live.backend.graphs, "thinker", at=3) as gate:
            connection.input_audio_buffer.append(audio=pcm(np.concatenate([voice(0.5, RATE), SILENT])))
            until(connection, "response.created")
            assert gate.reached.wait(20)
            connection.input_audio_buffer.append(audio=pcm(voice(0.5, RATE)))
            time.sleep(0.2)
            gate.go.set()
            came = until(connection, "response.done")
        response = came[-1].response
        assert (response.status, response.status_details.reason) == ("cancelled", "turn_detected")
        connection.input_audio_buffer.append(audio=pcm(SILENT))
        assert until(connection, "response.done")[-1].response.status == "completed"


@pytest.mark.parametrize("graph", ["bigvgan", "dit"])
def test_what_the_model_has_forgotten_is_not_told_either(
    served: Served, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that is stopped is cut to what was sent of its sound, before the client says how much was heard."""
    monkeypatch.setattr(served.live.decoder("talker"), "script", CODES)
    with connected(served, **BY_HAND) as connection:
        with held(served.live.backend.graphs, graph, at=2 if graph == "bigvgan" else 1) as gate:
            write(connection, "Hello")
            connection.response.create()
            came = until(connection, "response.output_item.added")
            assert gate.reached.wait(20)
            item = came[-1].item
            connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=60_000)
            time.sleep(0.2)
        until(connection, "conversation.item.truncated")
        connection.conversation.item.retrieve(item_id=item.id)
        told = until(connection, "conversation.item.retrieved")[-1].item.content[0].transcript or ""
        assert told != SAID
        assert SAID.startswith(told)


def test_who_sends_faster_than_it_is_taken_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.serve.realtime.wire.inbox._PATIENCE", 0.3)
    with held(served.live.backend.graphs, "audio_encoder", at=1) as gate:
        with connected(served, **BY_HAND) as connection:
            for _ in range(8):
                connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
            assert gate.reached.wait(20)
            time.sleep(0.6)
            gate.go.set()
            assert until(connection, "error")[-1].error.code == "input_too_fast"
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_what_was_said_is_written_down_afterwards(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = []
    reply = OmniSession.reply

    def watched(*arguments: Any, **options: Any) -> Any:
        sampled.append(options["thinker"].temperature)
        return reply(*arguments, **options)

    monkeypatch.setattr(OmniSession, "reply", watched)
    transcribed = {"turn_detection": None, "transcription": {"model": "gpt-4o-mini-transcribe", "language": "en"}}
    with connected(served, audio={"input": transcribed}) as connection:
        connection.input_audio_buffer.append(audio=pcm(voice(0.5, RATE)))
        connection.input_audio_buffer.commit()
        connection.response.create()
        assert "input_audio_transcription.completed" not in str(kinds(until(connection, "response.done")))
        told = until(connection, "conversation.item.input_audio_transcription.completed")[-1]
        assert (told.transcript, told.usage.type) == (SAID, "tokens")
        assert sampled == [0.0], "the likeliest"
        connection.conversation.item.retrieve(item_id=told.item_id)
        item = until(connection, "conversation.item.retrieved")[-1].item
        assert item.content[0].transcript == SAID


def test_who_goes_on_before_the_answer_begins_is_heard_whole(served: Served) -> None:
    """The first part is being encoded when the second begins."""
    with connected(served) as connection:
        with held(served.live.backend.graphs, "audio_encoder", at=1) as gate:
            connection.input_audio_buffer.append(audio=pcm(np.concatenate([voice(0.5, RATE), SILENT])))
            until(connection, "response.created")
            assert gate.reached.wait(20)
            connection.input_audio_buffer.append(audio=pcm(voice(0.5, RATE)))
            time.sleep(0.2)
            gate.go.set()
            assert until(connection, "response.done")[-1].response.status == "cancelled"
        connection.input_audio_buffer.append(audio=pcm(SILENT))
        response = until(connection, "response.done")[-1].response
        assert response.status == "completed"
        assert response.usage.input_token_details.audio_tokens > 50, "both parts"


def test_what_was_not_heard_is_cut_and_past_the_end_is_no_error(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        (item,) = ask(connection, "Hello")[-2].response.output
        for milliseconds, text in ((900_000, SAID), (0, "")):
            connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=milliseconds)
            assert until(connection, "conversation.item.truncated")[-1].audio_end_ms == milliseconds
            connection.conversation.item.retrieve(item_id=item.id)
            read = until(connection, "conversation.item.retrieved")[-1].item
            assert (read.content[0].transcript or "") == text


def test_speech_that_may_not_interrupt_is_answered_afterwards(served: Served) -> None:
    detection = {"type": "semantic_vad", "eagerness": "high", "interrupt_response": False}
    with connected(served, audio={"input": {"turn_detection": detection}}) as connection:
        with held(served.live.backend.graphs, "thinker", at=3) as gate:
            connection.conversation.item.create(
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
            )
            connection.response.create()
            assert gate.reached.wait(20)
            connection.input_audio_buffer.append(audio=pcm(np.concatenate([voice(0.5, RATE), SILENT])))
            until(connection, "input_audio_buffer.committed")
        for _ in range(2):
            assert until(connection, "response.done")[-1].response.status == "completed"


def test_sound_that_waits_is_counted_as_it_was_sent(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format changes while sound waits behind the change: nothing of it stays counted."""
    monkeypatch.setattr("omniport.serve.realtime.wire.inbox._PATIENCE", 0.3)
    telephone = {"audio": {"input": {"format": {"type": "audio/pcmu"}, "turn_detection": None}}}
    studio = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}}
    with (
        held(served.live.backend.graphs, "audio_encoder", at=1) as gate,
        connected(served, **telephone) as connection,
    ):
        second = base64.b64encode(bytes(8000)).decode()
        for _ in range(3):
            connection.input_audio_buffer.append(audio=second)
        assert gate.reached.wait(20)
        connection.input_audio_buffer.clear()
        connection.session.update(session={"type": "realtime", **studio})  # type: ignore[typeddict-item]
        connection.input_audio_buffer.append(audio=pcm(voice(0.3, RATE)))  # 1.8 s, were it telephone's
        time.sleep(0.2)
        gate.go.set()
        until(connection, "session.updated")
        for _ in range(2):
            connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
        connection.input_audio_buffer.clear()
        until(connection, "input_audio_buffer.cleared")


def test_who_says_nothing_for_a_while_is_spoken_to(served: Served) -> None:
    stop = served.live.bundle.manifest.codec.stop[0]  # type: ignore[union-attr]
    served.live.script(SAID, [3, 5, 7, 11, 13, stop])  # 0.1 s
    detection = {"type": "server_vad", "idle_timeout_ms": 5000}
    with connected(served, audio={"input": {"turn_detection": detection}}) as connection:
        for _ in range(6):
            connection.input_audio_buffer.append(audio=pcm(SILENT))  # nothing was said before it: nobody is waited for
        ask(connection, "Hello")
        time.sleep(0.5)  # it has been played
        for _ in range(6):
            connection.input_audio_buffer.append(audio=pcm(SILENT))
        came = until(connection, "rate_limits.updated")
        assert kinds(came)[:5] == [
            "input_audio_buffer.timeout_triggered",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
        ]
        triggered = came[0]
        assert triggered.audio_start_ms == pytest.approx(6000, abs=70)
        assert triggered.audio_end_ms - triggered.audio_start_ms == pytest.approx(5000, abs=70)
        assert triggered.item_id == came[1].item_id == came[2].item.id
        assert came[-2].response.status == "completed"
        off = {"turn_detection": {"type": "server_vad", "idle_timeout_ms": None}}
        connection.session.update(session={"type": "realtime", "audio": {"input": off}})  # type: ignore[typeddict-item]
        detected = until(connection, "session.updated")[-1].session.audio.input.turn_detection
        assert detected.idle_timeout_ms is None


def test_what_was_cut_off_is_told_to_who_asked(served: Served) -> None:
    served.live.script(SAID, CODES)
    with connected(served, **BY_HAND, omniport={"events": True}) as connection:
        (item,) = ask(connection, "Hello")[-2].response.output
        connection.send({"type": "omniport.playback", "item_id": item.id, "played_ms": 0})  # type: ignore[misc, arg-type]
        on = {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
        connection.session.update(session={"type": "realtime", **on})  # type: ignore[typeddict-item]
        connection.input_audio_buffer.append(audio=pcm(voice(0.5, RATE)))
        cut = until(connection, "omniport.reply_cut")[-1].to_dict()
        assert (cut["item_id"], cut["heard_ms"], cut["transcript"]) == (item.id, 0, "")
        connection.input_audio_buffer.append(audio=pcm(SILENT))
        until(connection, "response.done")
    metrics = served.http().get("/metrics").text
    assert 'omniport_interruptions_total{reason="turn_detected"}' in metrics
    for name in ("heard_ratio_count", "input_lag_seconds_count", "vad_endpoint_seconds_count"):
        assert float(metrics.split(f"omniport_{name} ")[1].split()[0]) > 0, name
