"""Lines of conversations as programs write them: byte order marks, CRLF, and what a string of JSON may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from omniport.calib.calibration.dataset import read_samples
from omniport.calib.deployer import _data_key
from omniport.export.evaluation.conversations import read_conversations
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from omniport.runtime.prompt.tokenizer import TextCodec
from support.bundles import make_bundle


@pytest.fixture
def known(tmp_path: Path) -> tuple[Any, TextCodec]:
    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    return bundle.manifest, TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)


@pytest.mark.parametrize("code", [0x85, 0x2028, 0x2029])
@pytest.mark.parametrize(("mark", "end"), [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n"), (b"", "\r\n\r\n")])
def test_only_a_line_feed_ends_a_line(
    tmp_path: Path, known: tuple[Any, TextCodec], code: int, mark: bytes, end: str
) -> None:
    text = f"one{chr(code)}two"
    line = json.dumps({"messages": [{"role": "user", "content": text}], "reply": text}, ensure_ascii=False)
    assert chr(code) in line, "JSON has control characters below 32 escaped, and others as they are"
    path = tmp_path / "lines.jsonl"
    path.write_bytes(mark + (line + end).encode() * 2)
    found = [c.messages()[0]["content"] for c in read_conversations(path, *known)]
    assert found == [[{"type": "text", "text": text}]] * 2
    assert [known[1].decode(sample.reply) for sample in read_samples(path, *known)] == [text, text]


def test_a_file_of_lines_is_a_regular_one(tmp_path: Path, known: tuple[Any, TextCodec]) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match="not a regular file"):
        read_conversations(tmp_path / "pipe.jsonl", *known)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_a_deployment_sees_that_a_medium_of_its_samples_changed(tmp_path: Path, mark: bytes) -> None:
    parts = [{"type": "text", "text": "one\u2028two"}, {"type": "image", "image": "a.png"}]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(mark + json.dumps({"messages": parts}, ensure_ascii=False).encode())
    (tmp_path / "a.png").write_bytes(b"x")
    before = _data_key(path)
    assert _data_key(path) == before
    (tmp_path / "a.png").write_bytes(b"xy")
    assert _data_key(path) != before
