"""The recogniser that speech is measured with."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from omniport.export.evaluation.hearing import Ear, errors, words

from wren import sizes, speech_data

pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed (pip install omniport[hear])")


GRAMMAR = (
    "#JSGF V1.0;\ngrammar small;\n<n> = one | two | seven | eleven;\n"
    "public <s> = <n> plus <n> is <n> | the sky is blue | goodbye see you soon;\n"
)


@pytest.mark.parametrize(
    ("said", "heard", "wrong"),
    [("a b c", "a b c", 0), ("a b c", "", 3), ("a b c", "a c", 1), ("a b", "x a b", 1), ("a b c", "a x c", 1)],
)
def test_word_errors(said: str, heard: str, wrong: int) -> None:
    assert errors(said.split(), heard.split()) == wrong


def test_words_are_spelled_as_the_grammar_has_them() -> None:
    assert words("Hello! It's twenty-one, I think.") == ["hello", "it's", "twenty", "one", "i", "think"]


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed (apt-get install flite)")
def test_speech_is_heard_and_noise_is_not() -> None:
    text = "Seven plus two is eleven."
    sound = speech_data.speak(text, "slt", 1.0, sizes.RATE)
    noise = np.random.default_rng(0).normal(0, 0.05, len(sound)).astype(np.float32)
    listener = Ear(GRAMMAR)
    assert listener.score([(text, sound)]).rate == 0
    assert listener.score([(text, noise)]).rate >= 0.5
