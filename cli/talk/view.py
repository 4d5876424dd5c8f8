"""Display of ``omniport talk``: a live view in a terminal, plain lines elsewhere, JSON for machines."""

from __future__ import annotations

import importlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ..common import log_console, print_json, print_text, printable
from ..show_reply import event_dict

if TYPE_CHECKING:
    from omniport.runtime.events import Done, Stats
    from omniport.runtime.live.dialogue import DialogueEvent
    from rich.console import Console, RenderableType

#: the meter's left end: a quiet room
QUIET_DB = -60.0
METER = 24


class View(Protocol):
    """Gets what happens, from several threads."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def ready(self, facts: dict[str, Any], hint: str) -> None:
        """Everything is open: listening begins."""

    def level(self, rms: float, state: str, seconds: float) -> None:
        """How loud it is, 0..1; waiting, listening or replying; seconds heard of the turn."""

    def event(self, event: DialogueEvent) -> None:
        """What the conversation says."""

    def problem(self, text: str) -> None:
        """A turn failed; the conversation goes on."""


def latencies(stats: Stats) -> list[tuple[str, str]]:
    """Names and values of a reply's measurements, stage by stage."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} s"

    busy = stats.busy
    encode = busy.get("preprocess", 0.0) + busy.get("audio_encoder", 0.0) + busy.get("vision_encoder", 0.0)
    rows = [
        ("encode", seconds(encode)),
        ("prefill", f"{seconds(busy.get('prefill', 0.0))}, {stats.late_tokens} of {stats.prefilled_tokens} late"),
        ("TTFT", seconds(stats.time_to_first_token)),
    ]
    if stats.time_to_first_audio is not None:
        factor = "-" if stats.real_time_factor is None else f"{stats.real_time_factor:.2f}"
        rows += [
            ("TTFA", seconds(stats.time_to_first_audio)),
            ("RTF", factor),
            ("underruns", f"{stats.underruns}" + (f", {stats.underrun_seconds:.2f} s" if stats.underruns else "")),
        ]
    return [*rows, ("in all", seconds(stats.total_time))]


def describe(event: DialogueEvent) -> dict[str, Any]:
    """An event as JSON values, times to a tenth of a millisecond."""
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in event_dict(event).items()}


class JsonView:
    """One JSON object an event; ``at`` is in seconds since listening began."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun = clock()
        self._lock = threading.Lock()

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def ready(self, facts: dict[str, Any], hint: str) -> None:
        self._begun = self._clock()
        self._print({"event": "ready", **facts})

    def level(self, rms: float, state: str, seconds: float) -> None:
        """Not told."""

    def event(self, event: DialogueEvent) -> None:
        self._print(describe(event))

    def problem(self, text: str) -> None:
        self._print({"event": "error", "message": text})

    def _print(self, value: dict[str, Any]) -> None:
        with self._lock:
            at = round(self._clock() - self._begun, 4)
            print_json({"event": value.pop("event"), "at": at, **value})


class PlainView:
    """The replies' text on stdout, everything else on stderr, one line each."""

    def __init__(self, quiet: bool) -> None:
        self._log = log_console(quiet)
        self._lock = threading.Lock()

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def ready(self, facts: dict[str, Any], hint: str) -> None:
        self._note(hint)

    def level(self, rms: float, state: str, seconds: float) -> None:
        """Not told."""

    def event(self, event: DialogueEvent) -> None:
        from omniport.runtime.events import Done, TextDelta, TurnsDropped
        from omniport.runtime.live.dialogue import TurnBegan, TurnCommitted

        if isinstance(event, TextDelta):
            self._write(event.text)
        elif isinstance(event, TurnBegan):
            self._note(f"{event.time:.1f} s: listening" + (" (the reply is cut off)" if event.interrupted else ""))
        elif isinstance(event, TurnCommitted):
            self._note(f"{event.time:.1f} s: heard {event.seconds:.1f} s")
        elif isinstance(event, TurnsDropped):
            self._note(f"the conversation is full: {event.turns} of its oldest turns are forgotten")
        elif isinstance(event, Done):
            self._write("\n")
            self._note(" | ".join(f"{name} {value}" for name, value in latencies(event.stats)))

    def problem(self, text: str) -> None:
        self._note(f"error: {text}")

    def _write(self, text: str) -> None:
        with self._lock:
            print_text(text)

    def _note(self, text: str) -> None:
        with self._lock:
            self._log.print(text, style="dim", markup=False)


@dataclass
class Scene:
    """What the live view shows.

    Attributes:
        title: what talks. hint: how to use it, until the first reply. rms: loudness of the microphone, 0..1.
        heard: seconds of the turn. said, spoken: text, and seconds of sound, of the reply so far.
        stats: of the last reply.
    """

    title: str = ""
    hint: str = ""
    state: str = "waiting"
    rms: float = 0.0
    heard: float = 0.0
    said: str = ""
    spoken: float = 0.0
    stats: Stats | None = None


STATES = {"waiting": ("○", "dim"), "listening": ("●", "bold red"), "replying": ("▶", "bold green")}


def render(scene: Scene) -> RenderableType:
    """The live view: state and level, what is said, and the latency of each stage of the last reply."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    symbol, style = STATES[scene.state]
    state = Text.assemble((f"{symbol} {scene.state:<10}", style), meter(scene.rms))
    state.append(f"  heard {scene.heard:5.1f} s", "default")
    state.append(f"  said {scene.spoken:5.1f} s", "default")
    parts: list[RenderableType] = [state, Text(printable(scene.said[-600:]) or scene.hint, "" if scene.said else "dim")]
    if scene.stats is not None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        rows = latencies(scene.stats)
        for name, _ in rows:
            table.add_column(name, justify="left", no_wrap=True)
        table.add_row(*(value for _, value in rows))
        parts.append(table)
    return Panel(Group(*parts), title=Text(printable(scene.title)), title_align="left", border_style="dim")


def meter(rms: float) -> tuple[str, str]:
    """A bar of the loudness in decibels, from a quiet room to full scale, and its style."""
    decibels = 20 * math.log10(max(rms, 1e-9))
    filled = round(METER * min(1.0, max(0.0, 1 - decibels / QUIET_DB)))
    return "█" * filled + "░" * (METER - filled), "yellow" if filled > METER * 0.9 else "cyan"


@contextmanager
def no_echo() -> Iterator[None]:
    """What is typed does not show: it would push the panel up. Nothing where stdin is no terminal, or on Windows."""
    try:
        termios = importlib.import_module("termios")
    except ImportError:
        termios = None
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    changed = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]  # the fourth are the local modes
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class LiveView:
    """A panel at the bottom of the terminal; what was said scrolls up above it."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self.scene = Scene()
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> LiveView:
        from rich.live import Live

        self._stack.enter_context(no_echo())
        live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=12, transient=True)
        self._stack.enter_context(live)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ready(self, facts: dict[str, Any], hint: str) -> None:
        with self._lock:
            self.scene.title = "  ".join(str(facts[name]) for name in ("bundle", "voice", "backend") if facts.get(name))
            self.scene.hint = hint

    def level(self, rms: float, state: str, seconds: float) -> None:
        """As ``View.level``. The meter falls slowly, so that an eye can follow it."""
        with self._lock:
            self.scene.rms = max(rms, 0.8 * self.scene.rms)
            self.scene.state, self.scene.heard = state, seconds

    def event(self, event: DialogueEvent) -> None:
        from omniport.runtime.events import AudioChunk, Done, TextDelta, TurnsDropped
        from omniport.runtime.live.dialogue import TurnBegan, TurnCommitted

        with self._lock:
            if isinstance(event, TurnBegan):
                self.scene.state = "listening"
            elif isinstance(event, TurnCommitted):
                self.scene.state, self.scene.said, self.scene.spoken = "replying", "", 0.0
                self.line("you", f"{event.seconds:.1f} s of speech", "cyan")
            elif isinstance(event, TextDelta):
                self.scene.said += event.text
            elif isinstance(event, AudioChunk):
                self.scene.spoken += len(event.samples) / event.sample_rate
            elif isinstance(event, TurnsDropped):
                self.line("", f"the conversation is full: {event.turns} of its oldest turns are forgotten", "yellow")
            elif isinstance(event, Done):
                self._done(event)

    def problem(self, text: str) -> None:
        with self._lock:
            self.line("", f"error: {text}", "red")

    def _done(self, event: Done) -> None:
        self.scene.stats, self.scene.state = event.stats, "waiting"
        cut = " ... (cut off)" if event.finish_reason == "cancelled" else ""
        self.line("omni", event.text + cut, "green")

    def line(self, who: str, text: str, style: str) -> None:
        """Print above the panel."""
        from rich.text import Text

        self.console.print(Text.assemble((f"{who:<5}", f"bold {style}"), text))

    def _picture(self) -> RenderableType:
        return render(self.scene)
