"""Bodies with anything anywhere: each gets an answer or an error of the client's, and the next one is served."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support.served import Served

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CONTENT = [
    {"type": "text", "text": "Hello"},
    {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
    {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"\0\1" * 4000).decode(), "format": "pcm16"}},
    {"type": "video", "video": [PICTURE], "fps": 2},
    {"type": "file", "file": {"file_data": "data:text/plain,abc", "filename": "a"}},
]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": CONTENT},
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "Rain."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "modalities": ["text", "audio"],
        "audio": {"voice": {"id": "Ethan"}, "format": "wav"},
        "stream": False,
        "stream_options": {"include_usage": True},
        "max_tokens": 2,
        "temperature": 0.5,
        "seed": 1,
        "stop": ["a"],
        "tool_choice": "auto",
        "talker": {"max_tokens": 2, "top_k": 1},
        "mm_processor_kwargs": {"use_audio_in_video": True},
        "logit_bias": {},
    },
    "/v1/audio/speech": {
        "input": "Noon.",
        "voice": "Ethan",
        "response_format": "wav",
        "stream_format": "sse",
        "talker": {"max_tokens": 2},
        "speed": 1.0,
    },
}
VALUES: list[Any] = [None, True, 0, -1, 10**30, 1e308, 0.1, "", "x", "\ud800", "\0", "é" * 300, [], {}, [[]], [None]]
VALUES += [{"a": None}, {"type": "text"}, "data:", "data:;base64,!!", "https://x/", "file:///etc/passwd", [1] * 50]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def mutated(body: dict[str, Any], rng: random.Random) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *path, last = rng.choice([*places(body), ("extra",)])
        at = body
        for key in path:
            at = at[key]
        if rng.random() < 0.85 or last == "extra":
            at[last] = copy.deepcopy(rng.choice(VALUES))
        else:
            del at[last]
    made = json.dumps(body).encode()
    return made[: rng.randrange(len(made))] if rng.random() < 0.05 else made


@pytest.mark.parametrize("path", BODIES)
def test_anything_anywhere(served: Served, path: str) -> None:
    rng, http = random.Random(path), served.http()
    statuses = set()
    for _ in range(150):
        body = mutated(BODIES[path], rng)
        response = http.post(path, content=body)
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), body
        assert b"internal_error" not in response.content, body
        if response.status_code != 200:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert {200, 400} <= statuses
    assert served.quiet()
    assert http.post(path, json=BODIES[path]).status_code == 200
