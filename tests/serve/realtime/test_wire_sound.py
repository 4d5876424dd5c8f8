"""Formats of sound on the wire."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from omniport.serve.http.api_errors import ApiError
from omniport.serve.realtime.wire.wire_sound import OutgoingSound, WireFormat


def decoded(kind: str, codes: list[int]) -> list[int]:
    text = base64.b64encode(bytes(codes)).decode()
    samples = WireFormat(type=kind, rate=8000).decode(text, "audio")  # type: ignore[arg-type]
    return [round(float(sample) * 32768) for sample in samples]


def test_known_values_of_g711() -> None:
    """ITU-T G.711: silence, the smallest and the largest value, both signs."""
    assert decoded("audio/pcmu", [0xFF, 0x7F, 0x80, 0x00, 0xFE]) == [0, 0, 32124, -32124, 8]
    assert decoded("audio/pcma", [0xD5, 0x55, 0xAA, 0x2A, 0xD4]) == [8, -8, 32256, -32256, 24]


@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
def test_a_code_comes_back(kind: str) -> None:
    format = WireFormat(type=kind, rate=8000)  # type: ignore[arg-type]
    samples = format.decode(base64.b64encode(bytes(range(256))).decode(), "audio")
    again = format.decode(format.encode(samples), "audio")
    np.testing.assert_allclose(again, samples, atol=2 / 32768)


def test_pcm_comes_back() -> None:
    format, samples = WireFormat(), np.linspace(-1, 1, 1001, dtype=np.float32)
    np.testing.assert_allclose(format.decode(format.encode(samples), "audio"), samples, atol=1e-4)
    assert format.checked("x") == format


@pytest.mark.parametrize("text", ["%%%", "AAA", base64.b64encode(b"abc").decode()])
def test_no_sound(text: str) -> None:
    with pytest.raises(ApiError):
        WireFormat().decode(text, "audio")


def test_a_rate_that_is_not_taken() -> None:
    with pytest.raises(ApiError, match="rate"):
        WireFormat(rate=11025).checked("session.audio.input.format")
    assert WireFormat(type="audio/pcmu", rate=24000).checked("x").rate == 8000


def test_pieces_of_a_tenth_of_a_second_and_nothing_lost() -> None:
    sound = OutgoingSound(WireFormat(type="audio/pcmu", rate=8000), 24000)
    pieces = [piece for _ in range(5) for piece in sound.push(np.zeros(10_000, np.float32))]
    pieces += sound.finish()
    assert max(seconds for _, seconds in pieces) <= 0.1
    assert sum(seconds for _, seconds in pieces) == pytest.approx(50_000 / 24000, abs=1e-3)
    assert {base64.b64decode(text)[:1] for text, _ in pieces} == {b"\xff"}
