"""What hostile clients send: bodies and events with anything anywhere, damaged files, bytes that are no HTTP."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
from PIL import Image

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


EVENTS: list[dict[str, Any]] = [
    {
        "type": "session.update",
        "session": {
            "type": "realtime",
            "instructions": "Be brief.",
            "output_modalities": ["text"],
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "audio": {
                "input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None},
                "output": {"voice": "Ethan", "speed": 1.0},
            },
        },
    },
    {"type": "session.update", "session": {"modalities": ["text"], "input_audio_format": "pcm16", "voice": "Ethan"}},
    {"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(9600)).decode()},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {"type": "input_image_buffer.append", "image": PICTURE, "time_ms": 100},
    {
        "type": "conversation.item.create",
        "item": {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hello"}, {"type": "input_image", "image_url": PICTURE}],
        },
        "previous_item_id": "root",
    },
    {
        "type": "conversation.item.create",
        "item": {"type": "function_call_output", "call_id": "call_1", "output": "Rain."},
    },
    {"type": "conversation.item.retrieve", "item_id": "item_1"},
    {"type": "conversation.item.truncate", "item_id": "item_1", "content_index": 0, "audio_end_ms": 100},
    {"type": "conversation.item.delete", "item_id": "item_1"},
    {"type": "response.create", "response": {"output_modalities": ["audio"], "instructions": "Go on.", "metadata": {}}},
    {"type": "response.create"},
    {"type": "response.cancel"},
    {"type": "omniport.playback", "item_id": "item_1", "played_ms": 20},
    {"type": "session.finish"},
]


def event(rng: random.Random) -> str | bytes:
    """As a client may send it, or one who wants harm."""
    chosen = copy.deepcopy(rng.choice(EVENTS))
    if rng.random() < 0.3:
        return json.dumps(chosen)
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(2000))
    text = mutated(chosen, rng).decode()
    return text if rng.random() < 0.95 else text * 3


def _files() -> dict[str, bytes]:
    rng, files = np.random.default_rng(0), {}
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8))
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        held = io.BytesIO()
        picture.save(held, format)
        files[f"image/{format.lower()}"] = held.getvalue()
    for format in ("WAV", "FLAC", "OGG", "MP3"):
        held = io.BytesIO()
        soundfile.write(held, rng.uniform(-0.2, 0.2, 4000), 16000, format=format)
        files[f"audio/{format.lower()}"] = held.getvalue()
    return files


FILES = _files()


def damaged(rng: random.Random) -> tuple[str, bytes]:
    """A file that is none any more, mostly, and what it calls itself."""
    kind = rng.choice(list(FILES))
    data = bytearray(FILES[rng.choice(list(FILES)) if rng.random() < 0.1 else kind])
    for _ in range(rng.choice((0, 1, 3, 30))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return kind, bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)


def large_json(rng: random.Random) -> bytes:
    """JSON that costs more than it says."""
    deep, many = rng.choice((500, 100_000)), rng.choice((1_000, 300_000))
    messages = rng.choice(
        (
            "[" * deep + "]" * deep,
            '{"a":' * deep + "1" + "}" * deep,
            "[" + ",".join(["[]"] * many) + "]",
            "[" + ",".join(['{"role":"user","content":"a"}'] * (many // 100)) + "]",
            "[" + "9" * many + "]",
            "[1e" + "9" * 400 + "]",
            '[{"role":"user","content":"' + "\\ud83d" * (many // 100) + '"}]',
            '[{"role":"user","content":"' + rng.choice(("a ", "\\u0000", "\u202e", "é")) * (many // 3) + '"}]',
            '[{"role":"user","content":"a","content":"b"}]',
        )
    )
    made = f'{{"messages":{messages}}}'.encode("utf-8", "surrogatepass")
    return b"\xff\xfe" + made if rng.random() < 0.1 else made


_LINES = (
    b"Content-Length: 5",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Expect: 100-continue",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA",
    b"Connection: Upgrade\r\nUpgrade: h2c",
    b"Host: [",
    b"Origin: http://[::1",
    b"Authorization: Bearer \xff\x01",
    b"Cookie: " + b"a" * 20_000,
    b"X: " + b"y\r\n y",
    b"Content-Type: multipart/form-data; boundary=",
    b"Content-Type: multipart/form-data; boundary=x",
    b"Content-Type: application/json; charset=utf-7",
)
_TARGETS = (
    b"/health",
    b"/v1/chat/completions",
    b"/v1/realtime",
    b"*",
    b"//",
    b"/%00%0a",
    b"/v1/../v1/models",
    b"http://[",
    b"/\xff",
)


def raw_request(rng: random.Random) -> bytes:
    """Bytes that are HTTP, or nearly."""
    method = rng.choice((b"GET", b"POST", b"OPTIONS", b"PRI", b"get", b"\x16\x03\x01", b"CONNECT"))
    version = rng.choice((b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b""))
    lines = [b"Host: 127.0.0.1", *rng.sample(_LINES, rng.randrange(4))]
    body = rng.choice((b"", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"{}", b"--x\r\n\r\n", rng.randbytes(50)))
    made = b" ".join((method, rng.choice(_TARGETS), version)) + b"\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body
    return made[: rng.randrange(len(made))] if rng.random() < 0.3 else made
