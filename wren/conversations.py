"""Conversations drawn from the world, with pictures, clips and sound: what the thinker learns and is asked."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from wren import frame, media, sentences, sizes, speech_data, world
from wren.prompts import Floats, Laid, Prompts, Turn
from wren.world import Draw, Kind, Question, Split

# Turns of each kind of conversation: many, so that most of a row is not the system prompt.
TURNS: dict[str, int] = {"typed": 8, "spoken": 3, "picture": 5, "clip": 4}
PAUSE, LONG_PAUSE = 4000, 16000  # samples before and behind a question at most, and where silence is to be learned
FASTER = 0.08  # sounds of training are played faster or slower by so much at most, and with it higher or lower


class Conversations:
    """Draws conversations of the world, with pictures and sound.

    Args:
        whole_clips: clips have all their frames, not only those that the model sees.
    """

    def __init__(self, work: Path, split: Split, whole_clips: bool = False) -> None:
        self.split = split
        self.whole_clips = whole_clips
        self.work = work
        self.doubts = 0.0
        self.pauses = 0.0
        self.prompts = Prompts(work)
        self.utterances: dict[str, list[speech_data.Utterance]] = defaultdict(list)
        for voice in sizes.QUESTION_VOICES:
            for utterance in speech_data.spoken(work, voice):
                self.utterances[utterance.text].append(utterance)
        spoken = [q for q in sentences.spoken_questions(split) if q.asked in self.utterances]
        self.spoken = [q for q in spoken if q.picture is None]

    def sound(self, text: str, draw: Draw) -> Floats:
        """A sentence in some voice, speed, level and noise, float32 [n] at 16 kHz."""
        there = self.utterances[text]
        pcm = speech_data.sound_of(self.work, there[int(draw.integers(len(there)))]).astype(np.float32) / 32768
        if self.split == "train":
            at = np.arange(0, len(pcm) - 1, draw.uniform(1 - FASTER, 1 + FASTER))
            pcm = np.interp(at, np.arange(len(pcm)), pcm).astype(np.float32)
        return speech_data.disturb(np.pad(pcm, tuple(draw.integers(0, PAUSE, 2))), draw)

    def question_sound(self, text: str, draw: Draw) -> Floats:
        """``sound``, some of them with more silence around: digital, or with the room's noise."""
        if not self.pauses or draw.random() >= self.pauses:
            return self.sound(text, draw)
        around = tuple(draw.integers(0, LONG_PAUSE, 2))
        said = self.sound(text, draw)
        if draw.random() < 0.5:
            return np.pad(said, around)
        return speech_data.disturb(np.pad(said, around), draw)

    def turn(self, question: Question, draw: Draw, spoken: bool, seen: bool = False) -> Turn:
        """A question as a turn. ``seen``: its picture or clip was shown before."""
        heard = spoken and question.asked in self.utterances
        turn = Turn("" if heard else question.asked, question.answer)
        if heard:
            turn = replace(turn, sound=self.question_sound(question.asked, draw), said=question.asked)
        if question.picture and not seen:
            pixels, places = media.picture(question.picture, draw)
            turn = replace(turn, picture=pixels, places=places, names=question.picture.shapes)
        if question.clip and not seen:
            # where a sampler looks differs with its rule and with the file
            every = np.arange(0, media.CLIP_SECONDS, 1 / media.CLIP_FPS)
            times = every if self.whole_clips else np.linspace(0, draw.uniform(1.5, 2.0), 4)
            sound = media.clip_sound(self.sound(question.clip.word, draw), draw)
            frames, places = media.clip(question.clip, draw, times)
            turn = replace(
                turn, clip=(frames, sound), said=question.clip.word, places=places, names=question.clip.looks
            )
        return turn

    def typed(self, draw: Draw) -> list[Turn]:
        turns: list[Turn] = []
        while len(turns) < TURNS["typed"]:
            kind: Kind = "second_turn" if draw.random() < 0.2 else "typed"
            turns += self.asked(world.draw_question(kind, draw, self.split), draw, spoken=False)
        return turns

    def heard(self, draw: Draw) -> list[Turn]:
        count = TURNS["spoken"]
        if self.pauses and draw.random() < 0.5:
            return [self.turn(self.drawn("spoken", draw), draw, True) for _ in range(count)]
        return [self.turn(self.spoken[int(i)], draw, True) for i in draw.integers(len(self.spoken), size=count)]

    def pictured(self, draw: Draw) -> list[Turn]:
        """A picture and questions on it."""
        spoken = draw.random() < 0.4
        if draw.random() < 0.3:
            question = world.draw_question("second_turn", draw, self.split)
        else:
            question = world.draw_question("picture", draw, self.split)
        turns = self.asked(question, draw, spoken)
        picture = question.picture or (question.first and question.first.picture)
        while len(turns) < TURNS["picture"]:
            if picture:
                if self.doubts and draw.random() < self.doubts:
                    pairs = [world.is_there(picture, draw, nearly=True)]
                else:
                    pairs = world.picture_questions(picture, draw)
                asked, answer = pairs[int(draw.integers(len(pairs)))]
                turns.append(self.turn(Question("picture", asked, answer, picture), draw, spoken, seen=True))
            else:
                turns += self.asked(world.draw_question("typed", draw, self.split), draw, spoken)
        return turns

    def shown(self, draw: Draw) -> list[Turn]:
        """A clip and questions on it."""
        question = world.draw_question("video", draw, self.split)
        assert question.clip is not None
        turns = [self.turn(question, draw, spoken=False)]
        pairs = world.clip_questions(question.clip)
        for _ in range(TURNS["clip"] - 1):
            asked, answer = pairs[int(draw.integers(len(pairs)))]
            turns.append(self.turn(replace(question, asked=asked, answer=answer), draw, False, seen=True))
        return turns

    def asked(self, question: Question, draw: Draw, spoken: bool) -> list[Turn]:
        """One question by itself, behind the turn that it refers to."""
        before = [self.turn(question.first, draw, spoken)] if question.first else []
        return [*before, self.turn(question, draw, spoken)]

    def rows(self, what: str, draw: Draw, count: int) -> list[Laid]:
        make = {"typed": self.typed, "spoken": self.heard, "picture": self.pictured, "clip": self.shown}[what]
        systems = [None if draw.random() < 0.75 else frame.OTHER_PROMPT for _ in range(count)]
        return [self.prompts.lay(make(draw), system) for system in systems]

    def question(self, kind: Kind, draw: Draw) -> list[Turn]:
        """A single question of a kind, behind the turn that it refers to if it does."""
        return self.asked(self.drawn(kind, draw), draw, spoken=kind in ("spoken", "picture_spoken"))

    def drawn(self, kind: Kind, draw: Draw) -> Question:
        """A question of a kind. What is asked aloud is as often of each sort as what is typed.

        Most of the recorded sentences are words to repeat, of which alone there are so many.
        """
        question = world.draw_question(kind, draw, self.split)
        while kind in ("spoken", "picture_spoken") and question.asked not in self.utterances:
            question = world.draw_question(kind, draw, self.split)
        return question
