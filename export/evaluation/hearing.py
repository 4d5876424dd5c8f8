"""What is heard: a recogniser that knows the sentences that can be said (pocketsphinx, JSGF), as a measure of speech.

A free word loop of so small a recogniser hears little. With a grammar it is sharp: it makes few errors on speech, hears
noise and shuffled sound as wrong nearly always, and takes one sentence of the grammar for another only if they sound
alike. It always says some sentence of the grammar or none, so a measurement needs the errors on no speech beside it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.errors import UsageError
from omniport.runtime.media.source import require
from omniport.runtime.system.foreign import foreign

RATE = 16000
# The recogniser's own beams (1e-48, 7e-29) drop the right sentence of a large grammar at its first word: of 800 that
# Wren said, 9 were heard wrong with those alone, and 2 with these alone. Of other sentences' sound as much is heard
# wrong with either.
BEAM, WORD_BEAM = 1e-100, 1e-80
QUIET = 1e-3  # of full scale: no speech is so quiet, and wide beams find some sentence in anything
SILENCE = 0.1  # seconds of zeros before and after; the recogniser leaves them out of its mean, unlike faint noise


def words(text: str) -> list[str]:
    """The words of a sentence, as a grammar spells them."""
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


def grammar_of(sentences: Iterable[str]) -> str:
    """A JSGF grammar of sentences, none of which is taken apart."""
    spelled = dict.fromkeys(" ".join(words(sentence)) for sentence in sentences)
    return f"#JSGF V1.0;\ngrammar sentences;\npublic <sentence> = {' | '.join(filter(None, spelled))};\n"


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
    """Hears one of a grammar's sentences.

    Args:
        grammar: JSGF. Its words have to be in the recogniser's English dictionary (cmudict).

    Raises:
        UsageError: a word that the recogniser does not know, no grammar, or no recogniser.
    """

    def __init__(self, grammar: str) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise UsageError(
                f"hearing speech needs the 'pocketsphinx' package ({error}); run: pip install 'omniport[hear]'"
            ) from error
        # the mean over each sentence by itself: what is heard does not depend on what was heard before. Without the
        # best path through the lattice, which may end in the middle of the grammar's sentence.
        beams = {"beam": BEAM, "pbeam": BEAM, "wbeam": WORD_BEAM}
        self._decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", cmn="batch", bestpath=False, **beams)
        unknown = sorted({word for word in _terminals(grammar) if self._decoder.lookup_word(word) is None})
        if unknown:
            raise UsageError(
                f"the recogniser does not know {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}: it hears "
                "the English words of the CMU dictionary, in a grammar that is written in JSGF"
            )
        with foreign(UsageError, "the grammar cannot be read as JSGF", "Compare it with wren/questions/questions.gram"):
            self._decoder.add_jsgf_string("sentences", grammar)
            self._decoder.activate_search("sentences")

    def hear(self, sound: NDArray[np.float32], rate: int = 24000) -> list[str]:
        """Words of a sound [n] between -1 and 1; none of silence."""
        if not len(sound) or np.abs(sound).max() < QUIET:
            return []
        low = sound if rate == RATE else require("soxr").resample(sound, rate, RATE)
        padded = np.pad(low, round(SILENCE * RATE))
        samples = (np.clip(padded, -1, 1) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return [word.split("(")[0] for word in best.hypstr.split()] if best else []

    def score(self, pairs: Iterable[tuple[str, NDArray[np.float32]]]) -> Score:
        """Score of (text, sound at 24 kHz) pairs."""
        score = Score()
        for text, sound in pairs:
            score.add(text, self.hear(sound))
        return score


def _terminals(grammar: str) -> set[str]:
    """The words that a JSGF grammar's rules are made of."""
    rules = re.sub(r"#JSGF[^;]*;|\bgrammar\s[^;]*;|//[^\n]*|/[^/]*/|\{[^}]*\}|<[^>]*>|\bpublic\b", " ", grammar)
    return set(re.findall(r"[^\s()\[\]|*+;=]+", rules))
