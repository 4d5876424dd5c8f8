"""Question sets: what a bundle answers is compared with the right answers, and its speech is heard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from omniport.export.evaluation.hearing import grammar_of
from omniport.export.evaluation.questions import Answer, Question, answers, figures, read_questions
from omniport.runtime.errors import UsageError
from omniport.runtime.session import OmniSession
from support.paths import REPOSITORY

SHIPPED = REPOSITORY / "wren" / "questions" / "questions.jsonl"
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello!"}],
    "answer": "Hello! How can I help you?",
    "kind": "typed",
}


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[OmniSession]:
    with OmniSession.open(tiny_bundle) as opened:
        yield opened


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_a_set_is_read(session: OmniSession, tmp_path: Path) -> None:
    path = written(tmp_path, ASKED, {**ASKED, "answer": "No.", "kind": "other"})
    found = read_questions(path, session.manifest, session.text_codec)
    assert [(q.kind, q.answer) for q in found.questions] == [("typed", ASKED["answer"]), ("other", "No.")]
    assert "hello how can i help you | no" in found.grammar
    path.with_suffix(".gram").write_text("#JSGF V1.0;\ngrammar g;\npublic <s> = yes | no;\n")
    assert "yes | no" in read_questions(path, session.manifest, session.text_codec).grammar


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": ASKED["messages"]}, r"questions.jsonl:1: \"answer\" is None; the right text was expected"),
        ({**ASKED, "answer": " ?!"}, r"\"answer\" is ' \?!'"),
        ({**ASKED, "answer": 7}, r"\"answer\" is 7"),
        ({**ASKED, "kind": ["a"]}, r"\"kind\" is \['a'\]; a name was expected"),
        ({**ASKED, "reply": "Hello"}, r"one object with the key \"messages\", and answer, kind if wanted"),
        ({**ASKED, "messages": [{"role": "user", "content": [{"type": "audio", "audio": "no.wav"}]}]}, r"no\.wav"),
        ([], "one object"),
    ],
)
def test_lines_that_are_no_questions(session: OmniSession, tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_questions(written(tmp_path, line), session.manifest, session.text_codec)


def test_an_empty_set_is_refused(session: OmniSession, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no question"):
        read_questions(written(tmp_path), session.manifest, session.text_codec)


def test_a_grammar_that_cannot_be_read(session: OmniSession, tmp_path: Path) -> None:
    path = written(tmp_path, ASKED)
    path.with_suffix(".gram").write_bytes(b"#JSGF V1.0;\xff")
    with pytest.raises(UsageError, match=r"questions\.gram.*UTF-8"):
        read_questions(path, session.manifest, session.text_codec)


def test_every_shipped_question_is_one(session: OmniSession) -> None:
    """The set of Wren can be asked of any bundle: its media are there, and all kinds are in it."""
    found = read_questions(SHIPPED, session.manifest, session.text_codec)
    kinds = {kind: sum(q.kind == kind for q in found.questions) for kind in {q.kind for q in found.questions}}
    assert set(kinds) == {"typed", "spoken", "picture", "picture_spoken", "video", "second_turn"}
    assert min(kinds.values()) >= 8
    parts = [p for q in found.questions for m in q.messages for p in m["content"] if isinstance(p, dict)]
    named = {Path(part[part["type"]]) for part in parts if part["type"] in ("audio", "image", "video")}
    assert {path.name for path in named} | {"demo.png", "demo.flac", SHIPPED.name, "questions.gram", "calib"} == {
        path.name for path in SHIPPED.parent.iterdir()
    }


def test_answers_are_counted(session: OmniSession) -> None:
    """Random weights answer nothing right; what they say is sound of two voices in turn."""
    asked = [Question(ASKED["messages"], "Hello!", "a"), Question(ASKED["messages"], "No.", "b")]
    given = []
    # random weights never end their speech: a second of it is enough
    short = {"talker": replace(session.manifest.talker_sampling, max_new_tokens=50)}
    for number, answer in enumerate(answers(session, asked, options=short)):
        given.append(answer)
        assert len(answer.samples) == 480 * len(answer.codes)
        assert answer.voice == session.manifest.voices[number % 2].name
    found = figures(given, None, 24000)
    assert found.right == {"a": (0, 1), "b": (0, 1)}
    assert (found.questions, found.spoken, found.word_error_rate) == (2, 2, None)
    assert found.seconds == pytest.approx(sum(len(answer.samples) for answer in given) / 24000)


def test_case_and_punctuation_do_not_count() -> None:
    def said(text: str) -> Answer:
        return Answer(Question([], "Hello! How can I help you?"), "", text, np.zeros(0, np.float32), True, ())

    assert said("hello how can I help you").right
    assert not said("hello how can you help me").right


def test_words_are_heard() -> None:
    """The recogniser counts what is missing; silence has no words."""
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed (pip install omniport[hear])")
    from omniport.export.evaluation.hearing import Ear

    ear = Ear(grammar_of(["The sky is blue.", "Snow is white."]))
    silent = np.zeros(24000, np.float32)
    given = [Answer(Question([], "The sky is blue."), "A", "The sky is blue.", silent, True, (1,))]
    found = figures(given, ear, 24000)
    assert found.word_error_rate == 1.0
    assert found.right == {"": (1, 1)}
    with pytest.raises(UsageError, match="does not know blorp, wibblefrump"):
        Ear(grammar_of(["The wibblefrump is blorp."]))
    with pytest.raises(UsageError, match="cannot be read as JSGF"):
        Ear("#JSGF V1.0;\ngrammar g;\npublic <s> = ( yes ;\n")
