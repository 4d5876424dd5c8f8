"""What was said before in conversations that clients name."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

#: conversations, and messages of each
_MOST, _LONGEST = 64, 20


class Histories:
    """The last conversations, in text."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    def asked(self, id: str | None, text: str) -> list[dict[str, Any]]:
        """The messages of a conversation with another question; of one without an id there are no others."""
        before = self._known.get(id, []) if id is not None else []
        return [*before, {"role": "user", "content": text}]

    def answered(self, id: str | None, messages: list[dict[str, Any]], text: str) -> None:
        """What the answer was."""
        if id is not None:
            self._known[id] = [*messages, {"role": "assistant", "content": text}][-_LONGEST:]
            self._known.move_to_end(id)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
