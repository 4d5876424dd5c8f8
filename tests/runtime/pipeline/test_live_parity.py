"""Live turns on a real bundle against the same media in one message: caches, replies, speech."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import OmniSession, SamplingConfig
from support.live_turns import as_live, film, pieces, push_film, sort, voice

THINKER = SamplingConfig(max_new_tokens=10)
TALKER = SamplingConfig(max_new_tokens=14, temperature=0.0)


@pytest.fixture(autouse=True)
def _frames_as_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live clip cannot know how long it will be: it shows other frames than a whole file."""
    monkeypatch.setattr("omniport.runtime.media.video.sample_frames", as_live)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> OmniSession:
    return OmniSession.open(tiny_bundle, backend="ort-cpu", threads=1)


def cache_rows(cache: Any, length: int) -> NDArray[np.float32]:
    """Keys and values [layers, Hkv, length, D] of the first ``length`` tokens."""
    return np.stack([np.asarray(v.numpy()[0, :, :length], np.float32) for v in cache.values.values()])


def close(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    rms = float(np.sqrt(np.mean(wanted.astype(np.float64) ** 2)))
    assert rms > 1e-3, "the reference is silent: nothing is compared"
    return float(np.sqrt(np.mean((got - wanted).astype(np.float64) ** 2))) / rms < 1e-5


def same(session: OmniSession, parts: list[dict[str, Any]], push: Callable[[Any], None], exact: bool) -> bool:
    """True if the turn's caches, tokens, codes and sound are those of the message."""
    whole = session.fork()
    told = sort(whole.reply([{"role": "user", "content": parts}], thinker=THINKER, talker=TALKER))
    session.reset()
    turn = session.turn(thinker=THINKER, talker=TALKER, exact=exact)
    push(turn)
    heard = sort(turn.commit())
    prompt = told[2].stats.prompt_tokens
    assert heard[2].stats.prompt_tokens == prompt
    caches = session._conversation.caches
    for name in ("thinker", "talker"):
        wanted = cache_rows(whole._pool.borrow(name), prompt)
        if not close(cache_rows(caches.decoder(name)._cache, prompt), wanted):
            return False
    if (heard[2].token_ids, heard[2].codec_ids) != (told[2].token_ids, told[2].codec_ids):
        return False
    assert len(told[2].codec_ids) > 5
    return bool(np.abs(heard[1] - told[1]).max() < 1e-3 * np.abs(told[1]).max())


@pytest.mark.parametrize("seconds", [1.3, 4.7])
def test_sound(session: OmniSession, seconds: float) -> None:
    samples, rng = voice(seconds, 44100), np.random.default_rng(0)

    def push(turn: Any) -> None:
        for part in pieces(rng, len(samples), 20000):
            turn.push_audio(samples[part], 44100)

    assert same(session, [{"type": "audio", "audio": (samples, 44100)}], push, exact=False)


@pytest.mark.parametrize(("seconds", "sound"), [(3.0, 0.0), (3.5, 4.5), (5.0, 2.5)])
def test_video(session: OmniSession, tmp_path: Path, seconds: float, sound: float) -> None:
    path, rng = film(tmp_path / "film.mkv", seconds, sound), np.random.default_rng(0)
    part = {"type": "video", "video": path, "use_audio": True}
    assert same(session, [part], lambda turn: push_film(turn, path, rng, 0.4), exact=False)


def test_a_loud_end_needs_exact(session: OmniSession) -> None:
    samples = voice(7.0)[::-1].copy()
    samples[:48000] *= 1e-5
    parts = [{"type": "audio", "audio": (samples, 16000)}]
    assert same(session, parts, lambda turn: turn.push_audio(samples, 16000), exact=True)
    assert not same(session, parts, lambda turn: turn.push_audio(samples, 16000), exact=False)


def test_a_conversation_that_was_changed(session: OmniSession) -> None:
    """A reply was cut, messages were added before and behind it: the next one is that of the result, given at once."""
    changed, fresh = session.fork(), session.fork()
    picture = np.random.default_rng(1).integers(0, 255, (56, 84, 3), np.uint8)
    sound = (voice(2.3), 16000)
    turn = changed.turn(thinker=THINKER, talker=TALKER)
    turn.push([{"type": "audio", "audio": sound}])
    sort(turn.commit())
    question, reply = turn.item_ids
    added = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A disc."}]
    last = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Well?"}]}
    changed.items.append(added[0], before=question)
    changed.items.append(added[1])
    changed.items.append(last)
    turn.cancel(heard=0.0)
    got = sort(changed.turn(thinker=THINKER, talker=TALKER).answer())
    own = {"role": "system", "content": session.manifest.chat.system_prompt}
    asked = {"role": "user", "content": [{"type": "audio", "audio": sound}]}
    messages = [own, added[0], asked, {"role": "assistant", "content": ""}, added[1], last]
    wanted = sort(fresh.reply(messages, thinker=THINKER, talker=TALKER))
    assert changed.items[reply].content == []
    assert got[2].stats.prompt_tokens == wanted[2].stats.prompt_tokens
    assert got[2].stats.usage.prompt == wanted[2].stats.usage.prompt
    assert (got[2].token_ids, got[2].codec_ids) == (wanted[2].token_ids, wanted[2].codec_ids)
    assert len(wanted[2].codec_ids) > 5
    assert np.abs(got[1] - wanted[1]).max() < 1e-3 * np.abs(wanted[1]).max()
