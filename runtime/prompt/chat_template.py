"""Spell the chat template: the tokens around messages, and before a reply. Nothing else does.

Qwen2.5-Omni uses ChatML: ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n`` for each message, and ``<|im_start|>assistant\\n``
before the reply. Another model family would have its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import Manifest
from .positions import Layout
from .tokenizer import TextCodec

#: ``tool``, the result of a call, is laid out like the others, as the published template does
ROLES = ("system", "user", "assistant", "tool")


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
