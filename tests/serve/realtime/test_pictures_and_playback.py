"""Pictures in items and beside the sound; and what a client says of what it has played."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from openai.resources.realtime.realtime import RealtimeConnection
from PIL import Image
from support.live_turns import held, voice
from support.realtime import CODES, SAID, ask, connected, kinds, pcm, until
from support.served import Served

RATE = 24000
BY_HAND = {"audio": {"input": {"turn_detection": None}}}


@pytest.fixture(autouse=True)
def scripted(served: Served) -> None:
    served.live.script(SAID, CODES)


def picture(shade: int = 100, size: tuple[int, int] = (84, 56)) -> str:
    """Base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def frame(connection: RealtimeConnection, **fields: Any) -> None:
    connection.send({"type": "input_image_buffer.append", **fields})  # type: ignore[misc, arg-type]


def said_and_shown(connection: RealtimeConnection) -> tuple[int, int]:
    """Tokens of sound and of pictures in the turn that is committed now."""
    connection.input_audio_buffer.commit()
    connection.response.create(response={"output_modalities": ["text"]})
    details = until(connection, "response.done")[-1].response.usage.input_token_details
    return details.audio_tokens, details.image_tokens


def test_a_picture_in_an_item(served: Served) -> None:
    with connected(served) as connection:
        url = f"data:image/png;base64,{picture()}"
        content = [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": url, "detail": "low"},
        ]
        message = {"type": "message", "role": "user", "content": content}
        connection.conversation.item.create(item=message)  # type: ignore[arg-type]
        item = until(connection, "conversation.item.done")[-1].item
        assert [part.type for part in item.content] == ["input_text", "input_image"]
        done = ask(connection, "And?", output_modalities=["text"])[-2].response
        assert done.usage.input_token_details.image_tokens == 6, "84 x 56 pixels"
        message["content"] = [{"type": "input_image", "image_url": "https://example.org/a.png"}]
        connection.conversation.item.create(item=message)  # type: ignore[arg-type]
        assert until(connection, "error")[-1].error.code == "invalid_value"


def test_frames_beside_the_sound(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        frame(connection, image=picture(10))  # before the first sound: what was shown last counts
        for at in range(4):
            connection.input_audio_buffer.append(audio=pcm(voice(0.5, RATE)))
            frame(connection, image=f"data:image/png;base64,{picture(50 * at)}", time_ms=500 * (at + 1) - 1)
        frame(connection, image=picture(), time_ms=100)  # too late, and ignored
        audio, image = said_and_shown(connection)
        assert audio == 50
        assert image > 6
        alone, cached = said_alone(connection)
        assert (alone, cached) == (audio + 25, image), "the frames were those of one turn"


def said_alone(connection: RealtimeConnection) -> tuple[int, int]:
    connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
    return said_and_shown(connection)


def test_what_is_no_picture_is_told_and_the_sound_stays(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
        for image in ("", "%", base64.b64encode(b"no picture").decode(), "data:text/plain,x"):
            frame(connection, image=image, event_id="e")
            error = until(connection, "error")[-1].error
            assert (error.code, error.event_id) == ("invalid_value", "e")
        assert said_and_shown(connection) == (25, 0)


def test_frames_that_come_during_a_reply_belong_to_the_next_turn(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        with held(served.live.backend.graphs, "thinker", at=3) as gate:
            connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
            connection.input_audio_buffer.commit()
            connection.response.create(response={"output_modalities": ["text"]})
            assert gate.reached.wait(20)
            connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
            frame(connection, image=picture(), time_ms=200)
        first = until(connection, "response.done")[-1].response
        assert first.usage.input_token_details.image_tokens == 0
        audio, image = said_and_shown(connection)
        assert audio == 50
        assert image > 0


def test_frames_that_are_committed_during_a_reply_are_not_lost(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        with held(served.live.backend.graphs, "thinker", at=3) as gate:
            connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
            connection.input_audio_buffer.commit()
            connection.response.create(response={"output_modalities": ["text"]})
            assert gate.reached.wait(20)
            connection.input_audio_buffer.append(audio=pcm(voice(1.0, RATE)))
            frame(connection, image=picture(), time_ms=200)
            connection.input_audio_buffer.commit()
            until(connection, "input_audio_buffer.committed")
        until(connection, "response.done")
        connection.response.create(response={"output_modalities": ["text"]})
        details = until(connection, "response.done")[-1].response.usage.input_token_details
        assert (details.audio_tokens, details.image_tokens) == (50, 6)


def test_what_was_played_is_believed(served: Served) -> None:
    with connected(served, **BY_HAND) as connection:
        with held(served.live.backend.graphs, "bigvgan", at=2):
            content = [{"type": "input_text", "text": "Hello"}]
            connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})  # type: ignore[arg-type, misc, list-item]
            connection.response.create()
            added = until(connection, "response.output_audio.delta")[-1]
            for item, milliseconds in (("item_of_nobody", 9000), (added.item_id, 40)):
                told = {"type": "omniport.playback", "item_id": item, "played_ms": milliseconds}
                connection.send(told)  # type: ignore[arg-type]
            connection.conversation.item.retrieve(item_id=added.item_id)
            until(connection, "conversation.item.retrieved")  # so what was sent before was taken
        came = until(connection, "rate_limits.updated")
        assert "error" not in kinds(came)
        assert came[-2].response.to_dict()["omniport"]["heard_ms"] == 40
