"""The weights that training begins with: the same on every machine, whatever was drawn or made before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from wren import dit, frame, talker, thinker, vocoder  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wren")
    frame.folder(made)
    return made


@pytest.mark.parametrize("build", [thinker.build, talker.Speaker])
def test_a_work_folder_that_is_empty_changes_nothing(build: Callable[[Path], Any], work: Path, tmp_path: Path) -> None:
    """Making the checkpoint's files draws numbers too; a part that was trained after them had another embedding."""
    first, then = build(tmp_path / "empty").state_dict(), build(work).state_dict()
    assert all(torch.equal(value, then[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "build", [thinker.build, talker.Speaker, lambda work: dit.build(), lambda work: vocoder.build()]
)
def test_what_was_drawn_before_changes_nothing(build: Callable[[Path], Any], work: Path) -> None:
    torch.manual_seed(1)
    first = build(work).state_dict()
    torch.manual_seed(2)
    then = build(work).state_dict()
    drawn = torch.rand(1)
    assert all(torch.equal(value, then[name]) for name, value in first.items())
    torch.manual_seed(2)
    assert drawn == torch.rand(1), "and building draws nothing from others"


def test_two_parts_that_begin_together_share_one_folder(
    tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: Path, state: object) -> None:
        shutil.copytree(work / frame.FOLDER, tmp_path / frame.FOLDER)

    monkeypatch.setattr(frame, "write_weights", slow)
    assert (frame.folder(tmp_path) / frame.INDEX).is_file()
    assert [p.name for p in tmp_path.iterdir()] == [frame.FOLDER], "the second one's files are gone"
