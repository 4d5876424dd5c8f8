"""DashScope's own client, unmodified, for tests."""

from __future__ import annotations

import queue
from typing import Any

from dashscope.audio.qwen_omni import OmniRealtimeCallback


class Events(OmniRealtimeCallback):  # type: ignore[misc]
    """What has come."""

    def __init__(self) -> None:
        self.came: queue.Queue[dict[str, Any]] = queue.Queue()

    def on_event(self, message: dict[str, Any]) -> None:
        self.came.put(message)

    def until(self, kind: str) -> list[dict[str, Any]]:
        """What comes, up to an event of this kind."""
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] != kind:
            events.append(self.came.get(timeout=20))
            assert events[-1]["type"] != "error", events[-1]
        return events
