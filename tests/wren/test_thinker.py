"""The thinker's training: what is learned of a conversation, and the sounds that are spelled."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from wren import conversations, frame, media, thinker  # noqa: E402
from wren.prompts import NO_NAME, Laid, Prompts, Turn, mel_of_question  # noqa: E402
from wren.training import Crew  # noqa: E402
from wren.world import MOVES, Clip, Picture  # noqa: E402


def rows(prompts: Prompts) -> list[Laid]:
    sound = np.random.default_rng(0).normal(0, 0.05, 20317).astype(np.float32)
    spoken = Turn("", "Four.", sound=sound, said="What is two plus two?")
    return [
        prompts.lay([spoken, Turn("Say that again.", "Four.")]),
        prompts.lay([Turn("Hello!", "Hello! How can I help you?")], frame.OTHER_PROMPT),
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wren")


def test_answers_alone_are_learned_each_with_its_end(work: Path) -> None:
    prompts = Prompts(work)
    _, labels = prompts.batch(rows(prompts))
    said = [prompts.codec.encode("Four."), prompts.codec.encode("Hello! How can I help you?")]
    end = prompts.manifest.tokens.im_end
    assert labels[0][labels[0] >= 0].tolist() == 2 * [*said[0], end]
    assert labels[1][labels[1] >= 0].tolist() == [*said[1], end]


def test_sounds_are_spelled_by_the_audio_encoder(work: Path) -> None:
    prompts = Prompts(work)
    model = thinker.build(work)
    spelling = thinker.Spelling(model, prompts.manifest.tokens.audio)
    laid = rows(prompts)
    inputs, labels = prompts.batch(laid)
    encoder = list(model.model.audio_tower.parameters())
    optimizer = torch.optim.Adam(encoder, 1e-3)
    losses = []
    for _ in range(6):
        answers = thinker.loss_of_rows(model, inputs, labels)
        losses.append(spelling.loss(laid))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert answers.isfinite()
    assert losses[-1] < 0.8 * losses[0]


def test_pictures_are_named_token_by_token(work: Path) -> None:
    """Each token has the colour and the shape that it shows; ground has neither; scores of these names are right."""
    prompts = Prompts(work)
    shapes = (("red", "star"), ("blue", "circle"))
    pixels, places = media.picture(Picture(shapes), np.random.default_rng(2))
    laid = prompts.lay([Turn("What do you see?", "A star.", picture=pixels, places=places, names=shapes)])
    (names,) = laid.seen
    nothing = prompts.manifest.tokens.image
    (red,), (star,), (blue,), (circle,) = (prompts.codec.encode(f" {w}") for w in ("red", "star", "blue", "circle"))
    grid = names.reshape(4, 4, 3)[..., :2]
    assert (names[:, 2] == NO_NAME).all(), "nothing moves in a picture"  # 112 pixels, 28 a token
    assert {tuple(name) for name in names[:, :2].tolist()} == {(nothing, nothing), (red, star), (blue, circle)}
    for column, wanted in ((0, (red, star)), (3, (blue, circle))):
        found = {tuple(name) for name in grid[:, column].tolist()}
        assert found <= {(nothing, nothing), wanted}, "the star is on the left"
    names_of = torch.from_numpy(names)
    right = torch.zeros(16, 1280).scatter_(1, names_of[:, :2], 30.0)
    assert thinker.naming_loss(right, names_of, nothing) < 0.36, "half of ln 2: a shape's token has two names"
    ground = names_of[:, :1] == nothing
    for wrong in (torch.where(ground, right, right.roll(1, 1)), torch.where(ground, right.roll(1, 1), right)):
        assert thinker.naming_loss(wrong, names_of, nothing) > 3, "of shapes and of ground alike"


@pytest.mark.parametrize("change", MOVES)
def test_what_moves_in_a_clip_names_its_direction(work: Path, change: str) -> None:
    prompts = Prompts(work)
    clip = Clip("red", "star", change, "paper")
    frames, places = media.clip(clip, np.random.default_rng(3), np.linspace(0, 1.8, 4))
    sound = np.zeros(16000, np.float32)
    laid = prompts.lay([Turn("", "", clip=(frames, sound), places=places, names=clip.looks)])
    (names,) = laid.seen
    nothing = prompts.manifest.tokens.image
    told = [prompts.codec.encode(f" {word}")[0] for word in ("red", "star", change.split()[-1])]
    assert {tuple(name) for name in names.tolist()} == {(nothing, nothing, NO_NAME), tuple(told)}
    names_of = torch.from_numpy(names)
    scores = torch.zeros(len(names), 1280).scatter_(1, names_of.clamp(min=0), 30.0)
    scores[:, 0] = 0
    right = thinker.naming_loss(scores, names_of, nothing)
    assert right < 0.56, "half of ln 3: a moving shape's token has three names"
    scores[:, told[2]] = 0
    assert thinker.naming_loss(scores, names_of, nothing) > right + 3, "a direction that is not told costs"


@pytest.mark.parametrize("samples", [16000, 16001, 16159, 33333])
def test_the_mel_of_a_question_is_the_runtimes(work: Path, samples: int) -> None:
    from omniport.runtime.media.log_mel import log_mel

    loud = np.linspace(0, 0.1, samples).astype(np.float32)
    sound = np.random.default_rng(samples).standard_normal(samples).astype(np.float32) * loud
    want = log_mel(sound, frame.manifest(work).audio)
    np.testing.assert_allclose(mel_of_question(sound), want, atol=1e-4)


def test_questions_of_a_course_of_pauses_have_silence_around(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digital or with noise, up to a second on either side; before that course nothing is added."""
    said = np.random.default_rng(3).normal(0, 0.1, 8000).astype(np.float32)
    drawn = conversations.Conversations(work, "train")
    monkeypatch.setattr(drawn, "sound", lambda text, draw: said)
    plain = drawn.question_sound("Hello!", np.random.default_rng(0))
    np.testing.assert_array_equal(plain, said)
    drawn.pauses = 0.8
    sounds = [drawn.question_sound("Hello!", np.random.default_rng(seed)) for seed in range(200)]
    longer = [sound for sound in sounds if len(sound) > len(said)]
    digital = [sound for sound in longer if sound[0] == 0 and sound[-1] == 0]
    noisy = [sound for sound in longer if np.abs(sound[:20]).min() > 0 and np.abs(sound[-20:]).min() > 0]
    assert 0.7 < len(longer) / len(sounds) < 0.9
    assert 0.4 < len(digital) / len(longer) < 0.6
    assert len(digital) + len(noisy) == len(longer)
    assert max(map(len, sounds)) > len(said) + 24000
    assert max(map(len, sounds)) <= len(said) + 2 * conversations.LONG_PAUSE


@pytest.mark.parametrize("course", [thinker.FIRST, thinker.THIRD, thinker.FOURTH])
def test_kinds_count_alike_however_many_processes_learn_them(course: thinker.Course) -> None:
    """The mean of the processes' losses weighs every kind as one process does."""
    whole = sum(course.shares.values())
    for many in (1, 2, 3):
        each = [thinker.Lessons(Mock(), Mock(), course.rows, course.shares, Crew(n, many)) for n in range(many)]
        for kind, rows in course.rows.items():
            assert sum(lessons.rows.get(kind, 0) for lessons in each) == rows
            mean = sum(lessons.shares.get(kind, 0) for lessons in each) / many
            assert mean == pytest.approx(course.shares[kind] / whole)
