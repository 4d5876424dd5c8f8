"""What the talker is taught beside the next code: later codes, the text, and answers as often as they are given."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from wren import sentences, sizes, talker  # noqa: E402


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> talker.Speaker:
    return talker.Speaker(tmp_path_factory.mktemp("wren"))


def test_answers_are_said_as_often_as_they_are_given() -> None:
    answers = {question.answer for question in sentences.spoken_replies("train")}
    found = sentences.often(3000, answers)
    counts = Counter(question.answer for question in found)
    assert counts.keys() <= answers
    assert counts["Yes, there is."] > 20, "one of some 12,000 answers, and one of 60 that are given"
    assert [q.answer for q in sentences.often(50, answers)] == [q.answer for q in found[:50]], "drawn alike every time"


def test_codes_are_foretold_from_states_before_them(speaker: talker.Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that hold the code so many steps on cost nothing; one step off, they do."""
    monkeypatch.setattr(talker, "LATER", (6,))
    monkeypatch.setattr(speaker, "later", nn.ModuleList([nn.Identity()]))
    monkeypatch.setattr(speaker, "logits", lambda states: states)
    said = [torch.tensor([*range(sizes.FIRST_CODE, sizes.FIRST_CODE + count), talker.END]) for count in (30, 20)]
    classes = [torch.cat([torch.arange(len(ids) - 1), torch.tensor([sizes.CODES])]) for ids in said]
    for ahead, cheap in ((6, True), (5, False), (0, False)):
        kept = [30.0 * functional.one_hot(ids.roll(-ahead), sizes.CODES + 2).float() for ids in classes]
        assert (float(speaker._foretold(kept, said)) < 0.01) is cheap


def test_the_text_is_read_in_its_order(speaker: talker.Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaker, "reading", nn.Identity())
    text, blank = torch.tensor([5, 9, 7]), sizes.REGULAR_TOKENS
    path = torch.tensor([blank, 5, 5, blank, 9, 7, blank])
    states = 30.0 * functional.one_hot(path, blank + 1).float()
    assert float(speaker._read([states], [text])) < 0.1
    for wrong in (text.flip(0), torch.tensor([5, 9])):
        assert float(speaker._read([states], [wrong])) > 3
