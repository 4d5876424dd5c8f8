"""DashScope's own client, unmodified."""

from __future__ import annotations

import base64

import numpy as np
from dashscope.audio.qwen_omni import MultiModality, OmniRealtimeConversation
from support.dashscope_client import Events
from support.live_turns import voice
from support.served import Served


def test_a_turn_by_hand(served: Served) -> None:
    served.live.script("Hello")
    events = Events()
    url = f"ws{served.url[4:]}/v1/realtime"
    conversation = OmniRealtimeConversation(model="qwen-omni", callback=events, url=url, api_key="none")
    conversation.connect()
    try:
        conversation.update_session([MultiModality.TEXT, MultiModality.AUDIO], "Ethan", enable_turn_detection=False)
        session = events.until("session.updated")[-1]["session"]
        assert (session["voice"], session["input_audio_format"], session["turn_detection"]) == ("Ethan", "pcm16", None)
        samples = (voice(1.0, 16000) * 32767).astype("<i2")
        for piece in np.split(samples, 10):
            conversation.append_audio(base64.b64encode(piece.tobytes()).decode())
        conversation.commit()
        conversation.create_response()
        came = events.until("response.done")
        sound = [event["delta"] for event in came if event["type"] == "response.audio.delta"]
        said = [event["delta"] for event in came if event["type"] == "response.audio_transcript.delta"]
        assert sound
        assert "".join(said) == "Hello"
        assert came[-1]["response"]["usage"]["input_token_details"]["audio_tokens"] == 25, "one second, at 16 kHz"
        conversation.end_session()
    finally:
        conversation.close()
