"""What is heard: a recogniser that knows the world's sentences (pocketsphinx, JSGF grammar), as a measure of speech.

A free word loop of so small a recogniser hears little. With the grammar it is sharp: it makes few errors on flite's own
sound (under 1%), hears noise and shuffled sound as wrong nearly always, and takes one sentence of the world for another
only if they sound alike. It always says some sentence of the world or none, so what it says of no speech is measured
too.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pocketsphinx
import soxr  # type: ignore[import-untyped]
from numpy.typing import NDArray

from wren import sizes

HEARD_RATE = 16000
SILENCE = 0.1  # seconds of zeros before and after; the recogniser leaves them out of its mean, unlike faint noise


def words(text: str) -> list[str]:
    """The words of a sentence, as the grammar spells them."""
    plain = (word.strip(string.punctuation).lower() for word in text.replace("-", " ").split())
    return [word for word in plain if word]


def errors(said: list[str], heard: list[str]) -> int:
    """Words inserted, deleted or replaced, at least."""
    row = list(range(len(heard) + 1))
    for count, word in enumerate(said, 1):
        diagonal, row[0] = row[0], count
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


@dataclass
class Score:
    """Word error rate of several sentences."""

    words: int = 0
    wrong: int = 0
    sentences: int = 0
    exact: int = 0

    @property
    def rate(self) -> float:
        return self.wrong / max(1, self.words)

    def add(self, text: str, heard: list[str]) -> int:
        """Counts one sentence; gives its errors."""
        wrong = errors(words(text), heard)
        self.words += len(words(text))
        self.wrong += wrong
        self.sentences += 1
        self.exact += wrong == 0
        return wrong


class Ear:
    """Hears one of a grammar's sentences."""

    def __init__(self, grammar: str) -> None:
        # the mean over each sentence by itself: what is heard does not depend on what was heard before. Without the
        # best path through the lattice, which may end in the middle of the grammar's sentence.
        self._decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", cmn="batch", bestpath=False)
        self._decoder.add_jsgf_string("world", grammar)
        self._decoder.activate_search("world")

    def hear(self, sound: NDArray[np.float32], rate: int = sizes.RATE) -> list[str]:
        """Words of a sound [n] between -1 and 1."""
        low = sound if rate == HEARD_RATE else soxr.resample(sound, rate, HEARD_RATE)
        padded = np.pad(low, round(SILENCE * HEARD_RATE))
        samples = (np.clip(padded, -1, 1) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return [word.split("(")[0] for word in best.hypstr.split()] if best else []

    def score(self, pairs: Iterable[tuple[str, NDArray[np.float32]]], show: int = 0) -> Score:
        """Score of (text, sound at 24 kHz) pairs; prints the first ``show`` that were heard wrong."""
        score = Score()
        for text, sound in pairs:
            heard = self.hear(sound)
            if score.add(text, heard) and show > 0:
                show -= 1
                print(f"   said: {text} heard: {' '.join(heard)}", flush=True)
        return score
