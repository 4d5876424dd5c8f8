"""The closed world: right answers, nothing of the held-out combinations in training, and pictures that show it."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("av")

from wren import media, sentences, world
from wren.world import NUMBERS, Clip, Picture, Question

COUNT = 400


def drawn(kind: world.Kind, split: world.Split) -> list[Question]:
    draw = np.random.default_rng(1)
    return [world.draw_question(kind, draw, split) for _ in range(COUNT)]


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    assert drawn("picture", "train") == drawn("picture", "train")


def test_sums_are_right() -> None:
    found = 0
    for question in drawn("typed", "train") + drawn("typed", "held_out") + drawn("second_turn", "train"):
        said = re.fullmatch(r"(\w+) (plus|minus) (\w+) is (\w+)\.", question.answer.lower())
        if said:
            x, y, z = (NUMBERS.index(said[i]) for i in (1, 3, 4))
            assert z == (x + y if said[2] == "plus" else x - y), question
            found += 1
    assert found > COUNT / 4


def test_repetitions_say_what_was_said() -> None:
    for question in drawn("typed", "train"):
        lead, found, words = question.asked.partition(": ")
        if found and lead in ("Say", "Repeat after me"):
            assert question.answer.lower() == words.lower()


@pytest.mark.parametrize("kind", ["typed", "picture", "video"])
def test_held_out_questions_are_not_in_training(kind: world.Kind) -> None:
    def asked(split: world.Split) -> set[object]:
        several = (q for q in drawn(kind, split) if q.picture is None or len(q.picture.shapes) > 1)
        return {
            (q.asked, q.picture and q.picture.shapes, q.clip and (q.clip.colour, q.clip.shape, q.clip.change))
            for q in several
        }

    assert not asked("train") & asked("held_out")


def test_replies_for_the_talker_are_many_and_split() -> None:
    train, held_out = set(sentences.reply_sentences("train")), set(sentences.reply_sentences("held_out"))
    assert len(train) >= 10000
    assert len(held_out) >= 500
    assert not train & held_out
    assert [q.answer for q in sentences.spoken_replies("held_out")] == sentences.reply_sentences("held_out")


def centre(pixels: media.Pixels, colour: str) -> tuple[float, float]:
    """Mean column and row of what is about a colour."""
    near = np.abs(pixels.astype(int) - media.RGB[colour]).max(-1) < 30
    assert near.sum() > 40
    rows, columns = np.nonzero(near)
    return float(columns.mean()), float(rows.mean())


@pytest.mark.parametrize("column", [False, True])
def test_shapes_stand_in_their_order(column: bool) -> None:
    shapes = (("red", "star"), ("blue", "heart"), ("green", "circle"))
    for seed in range(5):
        pixels, places = media.picture(Picture(shapes, column), np.random.default_rng(seed))
        along = [centre(pixels, colour)[column] for colour, _ in shapes]
        assert along == sorted(along)
        for number, (colour, _) in enumerate(shapes, 1):  # what the places say is where the shape is
            assert (np.abs(pixels[places == number].astype(int) - media.RGB[colour]) < 30).all()


def test_a_clip_moves_where_it_is_said_to() -> None:
    draw = np.random.default_rng(0)
    frames, _ = media.clip(Clip("red", "circle", "moves to the left", "apple"), draw, np.array([0.0, 1.0, 2.0]))
    columns = [centre(frame, "red")[0] for frame in frames]
    assert columns[0] > columns[1] > columns[2]
    frames, _ = media.clip(Clip("red", "circle", "blue", "apple"), draw, np.array([0.0, 2.0]))
    centre(frames[0], "red")
    centre(frames[1], "blue")


def test_what_is_nearly_there_has_a_colour_or_a_shape_of_what_is() -> None:
    picture, draw = Picture((("red", "circle"), ("blue", "star")), False), np.random.default_rng(0)
    asked = [world.is_there(picture, draw, nearly=True) for _ in range(300)]
    there = {"Is there a red circle?", "Is there a blue star?"}
    assert {question for question, answer in asked if answer == "Yes, there is."} == there
    absent = {question for question, answer in asked if answer == "No, there is not."}
    assert "Is there a blue circle?" in absent
    assert all(any(word in question for word in ("red", "blue", "circle", "star")) for question in absent)
    assert len(absent) > 10
