"""Codes of speech: ids, seeds, and adding sentences."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wren import codes, sizes  # noqa: E402


def test_codes_are_seeded_in_their_range_and_decode_to_what_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "CODES", 32)
    torch.manual_seed(0)
    sounds = torch.randn(4, sizes.FRAMES_PER_CODE * sizes.MELS)
    mel = (sounds.repeat(100, 1) + 0.01 * torch.randn(400, sounds.shape[1])).reshape(-1, sizes.MELS)
    first, second = codes.make_codebook([mel]), codes.make_codebook([mel])
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    ids = codes.encode(mel, first)
    assert ids.shape == (400,)
    assert ids.min() >= sizes.FIRST_CODE
    assert ids.max() < sizes.FIRST_CODE + 32
    for sound in range(4):  # no two sounds share a code
        assert not set(ids[sound::4].tolist()) & set(ids[(sound + 1) % 4 :: 4].tolist())
    assert (codes.decode(ids, first) - mel).abs().mean() < 0.02


def test_blurred_codes_are_similar_ones() -> None:
    centres = torch.arange(20.0)[:, None]
    table = codes.neighbours({"centres": centres}, 2)
    said = torch.full((1000,), 10)
    blurred = codes.blur(said, 0.25, table, np.random.default_rng(0))
    assert set(blurred.tolist()) == {9, 10, 11}
    assert 0.2 < float((blurred != said).float().mean()) < 0.3
    assert torch.equal(codes.blur(said, 0.0, table, np.random.default_rng(0)), said)


def test_the_codes_lie_between_the_guidance_s_id_and_the_control_ids() -> None:
    assert 0 < sizes.FIRST_CODE < sizes.FIRST_CODE + sizes.CODES <= sizes.CODEC_PAD
