"""Questions whose right answers are known: how many a bundle answers, and how many of its words are heard.

A question set is a file of JSON lines. Each has ``messages``, as ``OmniSession.reply`` takes them (media are paths,
relative ones from the file's folder), ``answer``, the right text, and ``kind``, if wanted, by which figures are told
apart. The recogniser knows the sentences of a JSGF grammar beside it (``questions.jsonl``: ``questions.gram``), or
without one the answers of the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.errors import OmniportError, UsageError
from omniport.runtime.events import AudioChunk, Done
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.windows import SpeechWindows
from omniport.runtime.system.files import read_text
from omniport.runtime.system.progress import Progress

from .conversations import parse_entry, read_lines
from .hearing import Ear, Score, grammar_of, words
from .speech_metrics import clipped_share

#: a reply that goes on for so long does not end by itself
MAX_TOKENS, MAX_SPEECH_CODES = 64, 600


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked, and the right answer."""

    messages: Sequence[Mapping[str, Any]]
    answer: str
    kind: str = ""


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions, and the JSGF grammar that their answers are heard by."""

    questions: tuple[Question, ...]
    grammar: str


@dataclass(frozen=True, eq=False)
class Answer:
    """What a bundle said. ``ended``: the speech came to its end by itself; ``samples``: float32 [n]."""

    question: Question
    voice: str
    text: str
    samples: NDArray[np.float32]
    ended: bool
    codes: tuple[int, ...]

    @property
    def right(self) -> bool:
        """Whether it is the right one; case and punctuation do not count."""
        return words(self.text) == words(self.question.answer)


class AnswerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of all questions.

    Attributes:
        right: by kind, the number of right answers and of questions.
        word_error_rate: of the words that were to be said; None where nothing was spoken.
        ended: spoken replies that ended by themselves. clipped: samples at full scale.
        seconds: of sound.
    """

    questions: int
    right: dict[str, tuple[int, int]]
    spoken: int = 0
    word_error_rate: float | None = None
    ended: int = 0
    clipped: int = 0
    seconds: float = 0.0

    @property
    def right_share(self) -> float:
        """Right answers, over all kinds."""
        return sum(right for right, _ in self.right.values()) / self.questions


def read_questions(path: Path, manifest: Manifest, codec: TextCodec) -> QuestionSet:
    """Read a question set; every prompt is laid out once, so that bad input is found before anything is computed.

    Raises:
        UsageError: names the file and the line, and says what is wrong there.
    """
    questions = []
    for number, line in read_lines(path):
        try:
            entry = parse_entry(line, path.parent, ("answer", "kind"))
            build_prompt(entry["messages"], manifest, codec)
            answer, kind = entry.get("answer"), entry.get("kind", "")
            if not isinstance(answer, str) or not words(answer):
                raise ValueError(f'"answer" is {answer!r}; the right text was expected')
            if not isinstance(kind, str):
                raise ValueError(f'"kind" is {kind!r}; a name was expected')
        except (ValueError, OmniportError) as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        questions.append(Question(entry["messages"], answer, kind))
    if not questions:
        raise UsageError(f'{path} holds no question; at least one line with "messages" and "answer" was expected')
    beside = path.with_suffix(".gram")
    try:
        grammar = read_text(beside) if beside.exists() else grammar_of(q.answer for q in questions)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {beside}: {error}. A grammar (JSGF) in UTF-8 was expected") from error
    return QuestionSet(tuple(questions), grammar)


def answers(
    session: OmniSession,
    questions: Sequence[Question],
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Answer]:
    """What a session says to each question: the likeliest text, and speech as the bundle samples it, voices in turn.

    Args:
        progress: called with the number of questions that were asked, and of all.
        options: of ``OmniSession.reply`` besides, such as ``solver`` or ``window``, for spoken replies.
    """
    manifest = session.manifest
    thinker = replace(manifest.thinker_sampling, temperature=0.0, max_new_tokens=MAX_TOKENS)
    talker = manifest.talker_sampling
    voiced: dict[str, Any] = {}
    if manifest.speaks and talker is not None:
        voiced["talker"] = replace(talker, max_new_tokens=MAX_SPEECH_CODES)
        voiced["window"] = SpeechWindows()  # the same windows however slow the machine is
    for number, question in enumerate(questions):
        if progress is not None:
            progress("asking", number, len(questions))
        voice = manifest.voices[number % len(manifest.voices)].name if voiced else ""
        chosen = {**voiced, "voice": voice, "seed": number, **(options or {})} if voiced else {}
        events = list(session.reply(question.messages, speak=bool(voiced), thinker=thinker, **chosen))
        chunks = [event.samples for event in events if isinstance(event, AudioChunk)]
        done = next(event for event in events if isinstance(event, Done))
        sound = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
        ended = done.speech_finish_reason == "stop"
        yield Answer(question, voice, done.text, sound, ended, tuple(done.codec_ids))


def figures(given: Sequence[Answer], ear: Ear | None, sample_rate: int) -> AnswerFigures:
    """Figures of answers; without an ear nothing is heard."""
    right: dict[str, tuple[int, int]] = {}
    score, spoken = Score(), [answer for answer in given if len(answer.samples)]
    for answer in given:
        good, count = right.get(answer.question.kind, (0, 0))
        right[answer.question.kind] = good + answer.right, count + 1
    for answer in spoken if ear is not None else []:
        assert ear is not None
        score.add(answer.text, ear.hear(answer.samples, sample_rate))
    return AnswerFigures(
        questions=len(given),
        right=right,
        spoken=len(spoken),
        word_error_rate=score.rate if score.words else None,
        ended=sum(answer.ended for answer in spoken),
        clipped=round(sum(clipped_share(answer.samples) * len(answer.samples) for answer in spoken)),
        seconds=sum(len(answer.samples) for answer in spoken) / sample_rate,
    )
