"""Whether a conversation begins with the system message that speech was trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

_LOG = logging.getLogger(__name__)


class SpeechPrompt:
    """Compares system messages, and warns of the first that is another.

    Args:
        trained: the one that the talker was trained with.
    """

    def __init__(self, trained: str) -> None:
        self._trained, self._warned = trained, False

    def compare(self, system: str | Sequence[Mapping[str, Any]]) -> None:
        """A spoken reply is asked for under this system message."""
        text = system if isinstance(system, str) else "".join(str(part.get("text")) for part in system)
        if not self._warned and self._trained not in text:
            self._warned = True
            _LOG.warning(
                "speech may be poor: the talker was trained with the bundle's own system message, and this "
                "conversation has another. Leave it out, or begin it with chat.system_prompt of bundle.json"
            )
