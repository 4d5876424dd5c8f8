"""Text that comes in pieces, cut where a speaker would breathe."""

from __future__ import annotations

import re

from ..http.api_errors import invalid

#: characters of all of it, and after which a part is cut wherever there is a space
_MOST, _LONGEST = 20_000, 400
#: Chinese ends need no space after them
_END = re.compile(r"(?<=[.!?…])\s+|(?<=[\u3002\uff01\uff1f])\s*|\n+")


class Sentences:
    """Gives sentences as soon as they are complete."""

    def __init__(self) -> None:
        self._text, self._taken = "", 0

    def add(self, text: object) -> list[str]:
        """More text; what is complete now.

        Raises:
            ApiError: no text, or too much.
        """
        if not isinstance(text, str):
            raise invalid("the text is no string", "text")
        self._taken += len(text)
        if self._taken > _MOST:
            raise invalid(f"the text has more than {_MOST} characters", "text")
        *whole, self._text = _END.split(self._text + text)
        while len(self._text) > _LONGEST:
            cut = self._text.rfind(" ", 0, _LONGEST)
            cut = cut if cut > 0 else _LONGEST
            whole.append(self._text[:cut])
            self._text = self._text[cut:]
        return _spoken(whole)

    def finish(self) -> list[str]:
        """What is left."""
        rest, self._text = self._text, ""
        return _spoken([rest])


def _spoken(parts: list[str]) -> list[str]:
    """Those in which there is something to say."""
    return [part.strip() for part in parts if any(character.isalnum() for character in part)]
