"""A tab of a browser: what the page in it shows, says in its console, and exchanges with the server."""

from __future__ import annotations

import json
import time
from typing import Any

#: a refused request, which browsers print whatever the page does about it
_EXPECTED = "Failed to load resource"


class Tab:
    """One tab in a profile of its own.

    Attributes:
        page: Playwright's.
        sent, came: events of its WebSockets, with the seconds since the tab was opened as ``at``.
    """

    def __init__(self, browser: Any, url: str, before: str = "", **options: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.came: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self._opened = time.monotonic()
        self._context = browser.new_context(**options)
        self.page = self._context.new_page()
        self.page.set_default_timeout(20_000)
        if before:
            self.page.add_init_script(before)
        self.page.on("websocket", self._watch)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.goto(url)

    def close(self) -> None:
        """Nothing may have failed unseen: no exception, and nothing that the policy forbids."""
        self._context.close()
        assert not self.complaints, self.complaints

    def until(self, kind: str, count: int = 1, seconds: float = 30.0) -> dict[str, Any]:
        """The ``count``-th event of this kind that the server sent."""
        due = time.monotonic() + seconds
        while len(found := [event for event in self.came if event["type"] == kind]) < count:
            assert time.monotonic() < due, [event["type"] for event in self.came]
            self.page.wait_for_timeout(50)
        return found[count - 1]

    def told(self, kind: str) -> list[dict[str, Any]]:
        """Events of this kind that the page sent."""
        return [event for event in self.sent if event["type"] == kind]

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))

    def _watch(self, socket: Any) -> None:
        socket.on("framesent", lambda text: self._note(self.sent, text))
        socket.on("framereceived", lambda text: self._note(self.came, text))

    def _note(self, events: list[dict[str, Any]], text: str) -> None:
        events.append({**json.loads(text), "at": time.monotonic() - self._opened})

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning") and _EXPECTED not in message.text:
            self.complaints.append(message.text)
