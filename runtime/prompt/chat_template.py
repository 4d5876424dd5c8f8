"""Spell the chat template: the tokens around messages, and before a reply. Nothing else does.

Qwen2.5-Omni uses ChatML: ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`` for each message, and ``<|im_start|>assistant\\n``
before the reply. Another model family would have its own.

Qwen2.5-Omni's own template has no tools. Theirs is Qwen2.5's: signatures in the system message, calls as JSON between
tags in the assistant's, and results between tags in a message of the user. ``prompt/tools.py`` puts the pieces in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from .positions import Layout
from .tokenizer import TextCodec

#: ``tool``, the result of a call, is laid out like the others, as the published template does
ROLES = ("system", "user", "assistant", "tool", "developer")
#: between the speech prompt and instructions in one system message, as Qwen2.5's template sets tools behind it
BESIDE = "\n\n"
#: around a call, which is a JSON object, and around what it gave
TOOL_CALL = ("<tool_call>", "</tool_call>")
TOOL_RESPONSE = ("<tool_response>\n", "\n</tool_response>")


def begin_message(layout: Layout, role: str) -> None:
    """Append what comes before a message's content."""
    layout.control(layout.manifest.tokens.im_start)
    layout.text(f"{role}\n")


def end_message(layout: Layout) -> None:
    """Append what comes after it."""
    layout.control(layout.manifest.tokens.im_end)
    layout.text("\n")


def begin_reply(layout: Layout) -> None:
    """Append what the model continues with its reply."""
    begin_message(layout, "assistant")
    layout.flush()


def end_of_reply(manifest: Manifest, codec: TextCodec) -> NDArray[np.int64]:
    """Ids [n] after the reply's own: what ``end_message`` appends."""
    layout = Layout(manifest, codec)
    end_message(layout)
    layout.flush()
    return layout.segment().ids


def tool_signatures(tools: Sequence[str]) -> str:
    """What the first system message ends with where there are tools.

    Args:
        tools: JSON objects.
    """
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        + "\n".join(tools)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def tool_call(name: str, arguments: str) -> str:
    """A call in the assistant's message; ``arguments`` is a JSON object."""
    return f'{TOOL_CALL[0]}\n{{"name": "{name}", "arguments": {arguments}}}\n{TOOL_CALL[1]}'


def tool_result(layout: Layout, content: str, follows: bool) -> None:
    """Append what a call gave to a message of the user that holds nothing else; ``follows`` another one."""
    begin, end = TOOL_RESPONSE
    layout.text("\n" * follows + begin + content + end)
