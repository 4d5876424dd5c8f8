"""Print replies as they stream, one or a conversation, for ``omniport run`` and the demo."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import log_console, print_json, print_text
from .wav import WavWriter

if TYPE_CHECKING:
    from omniport.runtime import OmniSession
    from omniport.runtime.events import Done, Event, Stats
    from rich.console import Console

CHAT_HELP = "/audio FILE, /image FILE, /video FILE add to the next line; /clear starts over; /quit leaves"


@dataclass(frozen=True)
class Replier:
    """Runs replies of one session and prints their events.

    Attributes:
        options: keyword arguments of ``OmniSession.reply`` and ``turn`` (`reply_options`).
    """

    session: OmniSession
    options: Mapping[str, Any]
    json: bool = False
    quiet: bool = False

    def reply(self, messages: list[dict[str, Any]], speak: Path | None) -> Done:
        """Answer messages: text to stdout, speech to ``speak``, the measurements to stderr.

        The WAV file is in place before the ``done`` event is printed, and nothing is left behind on failure.
        """
        # refuses bad input before a file is begun
        events = self.session.reply(messages, speak=speak is not None, **self.options)
        return self._show(lambda: events, speak)

    def turn(self, content: list[dict[str, Any]], speak: Path | None) -> Done:
        """Answer the next turn of the session's conversation, as ``reply`` does."""
        with self.session.turn(speak=speak is not None, **self.options) as turn:
            turn.push(content)
            return self._show(turn.commit, speak)

    def _show(self, begin: Callable[[], Iterator[Event]], speak: Path | None) -> Done:
        """Print the events that ``begin`` gives once the WAV file is open."""
        from omniport.runtime.events import AudioChunk, Done, TextDelta, TurnsDropped

        done: Done | None = None
        with ExitStack() as stack:
            wav: WavWriter | None = None
            if speak is not None:
                vocoder = self.session.manifest.vocoder
                assert vocoder is not None, "a session refuses to speak without"
                wav = stack.enter_context(WavWriter(speak, vocoder.sample_rate))
            for event in begin():
                if isinstance(event, Done):
                    done = event
                    continue
                if isinstance(event, AudioChunk) and wav is not None:
                    wav.write(event.samples)
                if self.json:
                    print_json(event_dict(event))
                elif isinstance(event, TextDelta):
                    print_text(event.text)
                elif isinstance(event, TurnsDropped):
                    log_console(self.quiet).print(
                        f"the conversation outgrew the KV cache: its {event.turns} oldest turns are forgotten",
                        style="dim",
                    )
        assert done is not None, "a reply ends with Done"
        if self.json:
            print_json(event_dict(done) | {"wav": None if speak is None else str(speak)})
        else:
            print_text("\n")
            log_console(self.quiet).print(stats_line(done.stats), style="dim")
        return done


def event_dict(event: Any) -> dict[str, Any]:
    """An event as JSON values. Audio is described, not included: the samples are in the WAV file or were played."""
    from omniport.runtime.events import AudioChunk

    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    if not isinstance(event, AudioChunk):
        return {"event": name, **dataclasses.asdict(event)}
    described: dict[str, Any] = {"index": event.index, "samples": int(event.samples.size)}  # asdict would copy them
    return {"event": name, **described, "sample_rate": event.sample_rate, "time": event.time}


def stats_line(stats: Stats) -> str:
    """The measurements of a reply on one line."""
    parts = [f"{stats.prompt_tokens} prompt tokens, {stats.text_tokens} text tokens"]
    if stats.time_to_first_token is not None:
        parts.append(f"TTFT {stats.time_to_first_token:.2f} s")
    if stats.time_to_first_audio is not None:
        parts.append(f"TTFA {stats.time_to_first_audio:.2f} s")
    if stats.real_time_factor is not None:
        parts.append(f"{stats.audio_seconds:.2f} s of speech, RTF {stats.real_time_factor:.2f}")
    if stats.reused_tokens:
        parts.append(f"{stats.reused_tokens} tokens reused")
    return " | ".join([*parts, f"{stats.total_time:.2f} s in all", stats.backend])


@dataclass(frozen=True)
class MediaOptions:
    """How media files are sent; None: as the bundle says.

    Attributes:
        use_audio_in_video: a video's sound is heard.
        max_pixels: of a picture, and of a video's frame.
        fps: frames a second of a video. max_frames: how many at most.
    """

    use_audio_in_video: bool = True
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None

    def content(self, text: str, audio: list[Path], image: list[Path], video: list[Path]) -> list[dict[str, Any]]:
        """Parts in the order video, image, audio, text, as the model's users arrange them."""
        pixels = {"max_pixels": self.max_pixels}
        frames = {"use_audio": self.use_audio_in_video, "fps": self.fps, "max_frames": self.max_frames}
        parts: list[dict[str, Any]] = []
        parts += [{"type": "video", "video": path, **frames, **pixels} for path in video]
        parts += [{"type": "image", "image": path, **pixels} for path in image]
        parts += [{"type": "audio", "audio": path} for path in audio]
        if text:
            parts.append({"type": "text", "text": text})
        return parts


def chat(replier: Replier, system: str | None, speak: Path | None, media_options: MediaOptions) -> None:
    """Hold a conversation: every line of stdin is a turn; what was said stays in the KV cache.

    A turn that fails on bad input is reported and dropped; the conversation goes on. With ``speak`` set to
    ``reply.wav``, turn n is spoken into ``reply-n.wav``.
    """
    from omniport.runtime.errors import UserError

    console = log_console(replier.quiet)
    console.print(CHAT_HELP, style="dim", markup=False)
    replier.session.reset(system)
    media: dict[str, list[Path]] = {"audio": [], "image": [], "video": []}
    turn = 0
    while (line := _read_line(console)) not in (None, "/quit", "/exit"):
        assert line is not None
        if line == "/clear":
            replier.session.reset(system)
        elif line.startswith("/"):
            _add_medium(line, media, console)
        elif line or any(media.values()):
            content = media_options.content(line, media["audio"], media["image"], media["video"])
            media = {kind: [] for kind in media}
            try:
                replier.turn(content, None if speak is None else speak.with_stem(f"{speak.stem}-{turn + 1}"))
            except UserError as error:
                console.print(f"error: {error}", style="red", markup=False)
                continue
            turn += 1


def _read_line(console: Console) -> str | None:
    try:
        return console.input("[bold]you> [/bold]").strip()
    except EOFError:
        return None
    except (RuntimeError, OSError) as error:  # a service has no stdin; a terminal may be gone
        from omniport.runtime.errors import UsageError

        raise UsageError(f"stdin cannot be read ({error}): give --text, --audio, --image or --video") from error


def _add_medium(line: str, media: dict[str, list[Path]], console: Console) -> None:
    kind, _, name = line[1:].partition(" ")
    path = Path(name.strip()).expanduser()
    if kind not in media or not name.strip():
        console.print(f"not understood: {line}. {CHAT_HELP}", markup=False)
    elif not path.is_file():
        console.print(f"no such file: {path}", style="red", markup=False)
    else:
        media[kind].append(path)
        console.print(f"{kind} {path} goes with your next line (an empty line sends it alone)", markup=False)
