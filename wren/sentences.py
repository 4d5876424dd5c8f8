"""Sentences of the world that are spoken: answers by both voices, and questions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container

import numpy as np

from wren.world import KINDS, WORDS, Kind, Question, Split, draw_question

TRAINED_REPLIES, TRAINED_QUESTIONS, HELD_OUT = 12000, 5000, 1000


@functools.cache
def spoken_replies(split: Split) -> tuple[Question, ...]:
    """Questions whose answers are spoken: 12,000 for training; 1,000 whose answers are none of these."""
    if split == "train":
        return _drawn(split, TRAINED_REPLIES, KINDS, lambda q: q.answer)
    return _drawn(split, HELD_OUT, KINDS, lambda q: q.answer, {q.answer for q in spoken_replies("train")})


def reply_sentences(split: Split) -> list[str]:
    """The answers that are spoken."""
    return [q.answer for q in spoken_replies(split)]


def often(count: int, answers: Container[str]) -> list[Question]:
    """Questions of training as they are asked, whose answers are spoken.

    Most of the different answers repeat words, or list shapes. "Yes, there is." is one of 12,000, and was said wrong.
    """
    draw, found = np.random.default_rng(8), list[Question]()
    while len(found) < count:
        question = draw_question(KINDS[len(found) % len(KINDS)], draw, "train")
        if question.answer in answers:
            found.append(question)
    return found


@functools.cache
def spoken_questions(split: Split) -> tuple[Question, ...]:
    """Questions that are heard: 5,000 for training; 1,000 of held-out combinations that are none of these."""
    kinds: tuple[Kind, ...] = ("spoken", "spoken", "picture_spoken")
    if split == "train":
        return _drawn(split, TRAINED_QUESTIONS, kinds, lambda q: q.asked)
    return _drawn(split, HELD_OUT, kinds, lambda q: q.asked, {q.asked for q in spoken_questions("train")})


def question_sentences(split: Split) -> list[str]:
    """The questions that are heard."""
    return [q.asked for q in spoken_questions(split)]


def clip_words() -> tuple[str, ...]:
    """Words that are said in clips."""
    return WORDS


def _drawn(
    split: Split, count: int, kinds: tuple[Kind, ...], text: Callable[[Question], str], known: Container[str] = ()
) -> tuple[Question, ...]:
    """Questions whose texts are all different, and none of the known."""
    draw, found, tried = np.random.default_rng(5 if split == "train" else 6), dict[str, Question](), 0
    while len(found) < count and tried < 40 * count:
        tried += 1
        question = draw_question(kinds[tried % len(kinds)], draw, split)
        if text(question) not in known:
            found[text(question)] = question
    return tuple(found.values())
