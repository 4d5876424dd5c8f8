"""Wyoming's own client, unmodified, for tests."""

from __future__ import annotations

from wyoming.client import AsyncTcpClient
from wyoming.event import Event, Eventable


async def ask(client: AsyncTcpClient, last: str, *events: Eventable) -> list[Event]:
    """What comes back, up to an event of that type."""
    for event in events:
        await client.write_event(event.event())
    came: list[Event] = []
    while not came or came[-1].type not in (last, "error"):
        event = await client.read_event()
        assert event is not None, f"closed after {[event.type for event in came]}"
        came.append(event)
    return came
