"""Spoken replies in memory: what vocoder, codes and DiT are trained with and heard by."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wren import sizes, speech_data
from wren.mel import mel_of


@dataclass(frozen=True)
class Reply:
    """A spoken sentence: sound int16 [240 n], mel float32 [n, 80]."""

    text: str
    voice: str
    split: str
    sound: NDArray[np.int16]
    mel: Tensor


def replies(work: Path, voice: str, split: str, limit: int | None = None, skip: Container[str] = ()) -> Iterator[Reply]:
    """Replies of a voice, one at a time: the first ``limit`` of a split, without the texts to skip."""
    found = [u for u in speech_data.spoken(work, voice) if u.split == split]
    for utterance in found[:limit]:
        if utterance.text not in skip:
            sound = speech_data.sound_of(work, utterance)
            yield Reply(utterance.text, voice, split, sound, mel_of(sound))


def both_voices(work: Path, split: str, limit: int) -> list[Reply]:
    """``limit`` replies of each voice."""
    return [reply for voice in sizes.REPLY_VOICES for reply in replies(work, voice, split, limit)]


class Crops:
    """Random pieces of replies, each as probable as it is long. What is drawn depends on seed and step alone."""

    def __init__(self, replies: list[Reply], frames: int, seed: int) -> None:
        self.replies = [r for r in replies if len(r.mel) >= frames]
        self.frames = frames
        self.seed = seed
        lengths = np.array([len(r.mel) for r in self.replies], float)
        self.share = lengths / lengths.sum()

    def draw(self, step: int, count: int) -> tuple[list[tuple[Reply, int]], np.random.Generator]:
        """Replies and first frames (even: a code begins there), and the generator for what else is drawn."""
        draw = np.random.default_rng((self.seed, step))
        picked = [self.replies[i] for i in draw.choice(len(self.replies), count, p=self.share)]
        return [(r, 2 * int(draw.integers(0, (len(r.mel) - self.frames) // 2 + 1))) for r in picked], draw
