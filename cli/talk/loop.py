"""The loop of ``omniport talk``: turns from the microphone, replies to the loudspeaker, events to the view."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from omniport.runtime.live.dialogue import Dialogue, DialogueEvent

    from .playback import Loudspeaker, Microphone, Samples
    from .view import View


class Ears(Protocol):
    """Makes turns of sound: ``HandsFree``, or ``PushToTalk``."""

    dialogue: Dialogue

    def feed(self, samples: Samples, sample_rate: float) -> None:
        """The next samples."""

    def flush(self) -> None:
        """There are no more."""


class PushToTalk:
    """Turns that the Enter key begins and ends; during a reply it cuts the reply off.

    Args:
        keys: gets "enter" and "quit"; None for a recording, which is one turn.
        leave: called on "quit".
    """

    def __init__(
        self,
        dialogue: Dialogue,
        keys: queue.SimpleQueue[str] | None = None,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.dialogue = dialogue
        self._keys, self._leave = keys, leave
        self._begun = False

    def feed(self, samples: Samples, sample_rate: float) -> None:
        dialogue = self.dialogue
        dialogue.ready()
        dialogue.time += len(samples) / sample_rate
        while self._keys is not None and not self._keys.empty():
            self._press(self._keys.get())
        if self._keys is None and not self._begun:
            self._begun = True
            dialogue.begin()
        if dialogue.turn is not None and len(samples):
            dialogue.push(samples, sample_rate)

    def flush(self) -> None:
        self.dialogue.commit()

    def _press(self, key: str) -> None:
        if key == "quit":
            self.dialogue.drop()
            self._leave()
        elif self.dialogue.turn is None:
            self.dialogue.begin()
        else:
            self.dialogue.commit()


def read_keys() -> queue.SimpleQueue[str]:
    """Read lines of stdin in a thread: each is an Enter; ``q`` or the end of input asks to leave."""
    keys: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin or ():  # a service has none
            if line.strip().lower() in ("q", "quit", "/quit"):
                break
            keys.put("enter")
        keys.put("quit")

    threading.Thread(target=read, name="omniport-keys", daemon=True).start()
    return keys


class Stage:
    """Takes the dialogue's events to loudspeaker and view."""

    def __init__(self, speaker: Loudspeaker | None, view: View) -> None:
        self._speaker, self._view = speaker, view

    def event(self, event: DialogueEvent) -> None:
        from omniport.runtime.events import AudioChunk
        from omniport.runtime.live.dialogue import TurnBegan, TurnCommitted

        speaker = self._speaker
        if speaker is not None:
            if isinstance(event, TurnBegan):
                speaker.stop()  # chunks of the cut reply that are still on their way are not played either
            elif isinstance(event, TurnCommitted):
                speaker.begin()
            elif isinstance(event, AudioChunk):
                speaker.play(event.samples)
        self._view.event(event)


@dataclass(frozen=True)
class Talk:
    """A conversation under way.

    Attributes:
        lasting: a turn that fails on its input is reported and the conversation goes on; else it ends it. What fails
            again with the next block ends it in any case.
    """

    ears: Ears
    microphone: Microphone
    speaker: Loudspeaker | None
    view: View
    lasting: bool
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Until the microphone ends, and the last reply was played.

        Raises:
            OmniportError: of a turn or a reply.
        """
        if self.speaker is not None:
            self.speaker.start()
        for block in self.microphone.blocks():
            self._guard(lambda block=block: self.ears.feed(block, self.microphone.sample_rate))  # type: ignore[misc]
            self._show(block)
        self._guard(self.ears.flush)
        self._guard(self.ears.dialogue.wait)
        if self.speaker is not None:
            self.speaker.drain()

    def _guard(self, act: Callable[[], Any]) -> None:
        from omniport.runtime.errors import UserError

        try:
            act()
            self.failures.clear()
        except UserError as error:
            if not self.lasting or self.failures:
                raise
            self.failures.append(str(error))
            self.view.problem(str(error))

    def _show(self, block: Samples) -> None:
        import numpy as np

        dialogue = self.ears.dialogue
        rms = float(np.sqrt(np.mean(block**2))) if len(block) else 0.0
        self.view.level(rms, dialogue.state, dialogue.seconds if dialogue.turn is not None else 0.0)
