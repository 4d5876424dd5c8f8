"""The recorded question of real weights: what it compares can fail, and its files are fetched once."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from omniport.export.validation.checks import acceptance
from omniport.export.validation.types import FAIL, PASS
from omniport.export.validation.validate import validate
from PIL import Image
from support.command_line import Omniport


@pytest.mark.parametrize(
    ("answer", "status", "recorded"),
    [
        (acceptance.ANSWERS[0], PASS, True),
        (acceptance.ANSWERS[1] + "\n", PASS, True),
        ("Glass breaks, and I see a labrador.", PASS, False),
        ("The sound is glass shattering, and the dog is a Poodle.", FAIL, None),
        ("The sound is a cough, and the dog is a Labrador Retriever.", FAIL, None),
        ("", FAIL, None),
    ],
)
def test_answers(answer: str, status: str, recorded: bool | None) -> None:
    check = acceptance.answer_check(answer)
    assert check.status == status
    assert check.figures.get("as_recorded") is recorded


def test_prompts_and_pixels() -> None:
    ids = [*acceptance.PROMPT, 151646, 151646]
    assert acceptance.prompt_check(ids).status == PASS
    for wrong in (ids[:10], [*ids[:4], 1, *ids[5:]]):
        assert acceptance.prompt_check(wrong).status == FAIL
    pixels = np.asarray(acceptance.PIXELS, np.float32)
    assert acceptance.pixel_check(pixels + np.float32(0.002)).status == PASS
    assert acceptance.pixel_check(pixels + np.float32(0.004)).status == FAIL
    assert acceptance.pixel_check(pixels[:, ::-1]).status == FAIL


def test_random_weights_do_not_pass(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path))
    asked = []

    def answer(address: str, timeout: float) -> Any:
        asked.append(address)
        content = io.BytesIO()
        if address == acceptance.PICTURE:
            Image.new("RGB", (112, 84), (200, 30, 60)).save(content, "JPEG")
        else:
            soundfile.write(content, np.sin(np.arange(16000) / 9), 16000, format="WAV")
        return io.BytesIO(content.getvalue())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    for _ in range(2):
        report = validate(tiny_bundle, tiny_checkpoint, graphs=["acceptance"]).report
        assert not report.ok
        assert {check.stage for check in report.checks} == {"acceptance"}
        assert [check.status for check in report.checks] == [FAIL] * 3, "another tokenizer, picture and model"
    assert asked == [acceptance.SOUND, acceptance.PICTURE], "each file is fetched once"


def test_without_a_network_it_says_where_the_files_belong(
    omniport: Omniport,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    code, out, _ = omniport("validate", tiny_bundle, tiny_checkpoint, "--acceptance", "--json", "-")
    assert code == 1
    (check,) = json.loads(out)["checks"]
    assert check["status"] == "not_run"
    assert "no route to host" in check["message"]
    assert str(tmp_path / "acceptance" / "glass-breaking-151256.mp3") in check["message"]
    assert list(tmp_path.glob("acceptance/*")) == []
