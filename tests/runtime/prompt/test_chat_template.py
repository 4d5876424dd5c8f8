"""The chat template is spelled in one place, and says what transformers' own template says (test_prompt.py)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omniport.runtime.prompt import chat_template
from omniport.runtime.prompt.positions import Layout
from support.live_turns import Live
from support.paths import REPOSITORY

RUNTIME = REPOSITORY / "runtime"
HOME = RUNTIME / "prompt" / "chat_template.py"


def spellings(tree: ast.AST) -> Iterator[str]:
    """What of the template a file spells: its control tokens, a role with its line break, a line break as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("im_start", "im_end"):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.match(rf"({'|'.join(chat_template.ROLES)})\n", node.value):
                yield node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("text", "encode"):
            yield from ("a line break" for a in node.args if isinstance(a, ast.Constant) and a.value == "\n")


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda path: path.relative_to(RUNTIME).as_posix())
def test_nothing_else_spells_the_template(path: Path) -> None:
    assert bool(list(spellings(ast.parse(path.read_text())))) == (path == HOME)


def test_a_conversation_is_its_messages_one_after_the_other(live: Live) -> None:
    manifest, codec = live.session.manifest, live.session.text_codec
    layout = Layout(manifest, codec)
    chat_template.begin_message(layout, "user")
    layout.text("Hi")
    chat_template.end_message(layout)
    chat_template.begin_reply(layout)
    start, end = manifest.tokens.im_start, manifest.tokens.im_end
    ids = layout.segment().ids.tolist()
    assert ids == [start, *codec.encode("user\nHi"), end, *codec.encode("\n"), start, *codec.encode("assistant\n")]
    assert chat_template.end_of_reply(manifest, codec).tolist() == [end, *codec.encode("\n")]
