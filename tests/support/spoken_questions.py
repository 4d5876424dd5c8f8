"""Held-out questions that are spoken to Wren, the trained model, and its ear for the answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from .paths import REPOSITORY

WREN = REPOSITORY / "wren" / "checkpoint"
_QUESTIONS = REPOSITORY / "wren" / "questions"
RATE = 24000
#: of a sentence's words, so many may be heard wrong: other processors round otherwise, and sample other codes
_WRONG = 1
#: of two questions, which are understood with the silence around them that ends a turn. Chelsie's answers are heard
#: right for each of ten seeds; "One, two, three, four, five.", as Ethan samples it, was not in a quarter of twelve
ANSWERS = ("Seven, six, five, four, three, two.", "Before Monday comes Sunday.")


@dataclass(frozen=True, eq=False)
class SpokenQuestion:
    """A recording, and the right answer."""

    path: Path
    answer: str

    @cached_property
    def sound(self) -> NDArray[np.float32]:
        """At 24 kHz."""
        samples, rate = soundfile.read(self.path, dtype="float32")
        return np.asarray(soxr.resample(samples, rate, RATE))

    def pieces(self, before: float = 0.3, behind: float = 1.0) -> list[bytes]:
        """As a microphone gives it, 16 bits, 40 ms each: seconds of silence, the question, and silence that ends it."""
        samples = np.pad(self.sound, (round(before * RATE), round(behind * RATE)))
        data, size = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes(), 2 * RATE // 25
        return [data[at : at + size] for at in range(0, len(data), size)]


def question(answer: str) -> SpokenQuestion:
    """That with this answer."""
    for line in (_QUESTIONS / "questions.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "spoken" and entry["answer"] == answer:
            (part,) = entry["messages"][-1]["content"]
            return SpokenQuestion(_QUESTIONS / part["audio"], answer)
    raise LookupError(answer)


class Listener:
    """Who reads an answer and hears how it is spoken."""

    def __init__(self) -> None:
        from omniport.export.evaluation.hearing import Ear

        self._ear = Ear((_QUESTIONS / "questions.gram").read_text())

    def hears(self, sound: bytes | NDArray[np.float32], text: str) -> bool:
        """Whether a sound (16-bit, or float32, 24 kHz) says the text."""
        from omniport.export.evaluation.hearing import errors, words

        samples = np.frombuffer(sound, "<i2").astype(np.float32) / 32768 if isinstance(sound, bytes) else sound
        return errors(words(text), self._ear.hear(samples)) <= _WRONG
