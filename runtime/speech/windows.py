"""Cut outgoing speech into windows: the one place that holds their sizes, in codec tokens.

The DiT solves each window together with the codes that its block attention looks ahead to, and those before it where
nothing is kept of the window before (``window_codes``); the vocoder sees some mel frames around it. Token2Wav does it;
the planner, the TensorRT profiles and the command line take their figures from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..bundle.manifest import DitGeometry, VocoderGeometry
from ..errors import UsageError

#: new codes of a window on a CPU that is behind: 1.05 times the codes that are spoken are solved, instead of 1.25
BEHIND_CODES = 240
#: fewest mel frames of context that the vocoder is near exact with
_LEAST_CONTEXT = 20


@dataclass(frozen=True)
class SpeechWindows:
    """How streamed speech is cut.

    Attributes:
        chunks: codes that the first, the second, ... and every later window adds: whole attention blocks of 12 codes.
            The first sound has to wait for ``chunks[0]`` codes and the look-ahead of 12; long windows solve less twice.
        vocoder_context: mel frames around a window that the vocoder sees, at least 20. None is the bundle's receptive
            field (34), with which its samples depend on nothing else.
        behind: codes of every window after the first where DiT and vocoder, in windows of ``chunks[-1]``, are slower
            than the speech is heard: there are gaps anyway, and few that end sooner are better. None: as ``chunks``
            says.
    """

    chunks: tuple[int, ...] = (12, 24, 48)
    vocoder_context: int | None = None
    behind: int | None = None


_Name = Literal["stream", "whole"]
Window = _Name | SpeechWindows


def window_codes(new: int, dit: DitGeometry) -> int:
    """Codes that the DiT solves for a window that adds ``new`` codes."""
    return again_before(dit) + new + dit.look_ahead_codes


def again_before(dit: DitGeometry) -> int:
    """Codes before a window that are solved again with it: none where the DiT keeps keys and values between windows."""
    return 0 if dit.past_layers else dit.look_back_codes


def vocoder_lengths(windows: SpeechWindows, context: int, dit: DitGeometry) -> tuple[int, ...]:
    """Mel frames that the vocoder sees of whole windows, ascending: the first, the second, ... and every later one.

    Args:
        context: mel frames around a window that the vocoder sees.
    """
    right = min(context + 1, dit.look_ahead_codes * dit.repeats)
    chunks, found, done = list(windows.chunks), set(), 0
    while chunks or done < context:
        new = dit.repeats * (chunks.pop(0) if chunks else windows.chunks[-1])
        found.add(min(context, done) + new + right)
        done += new
    found.add(context + dit.repeats * windows.chunks[-1] + right)
    return tuple(sorted(found))


#: codes of the longest streamed window of an engine, and of any bundle with the usual DiT
STREAM_CODES = window_codes(SpeechWindows().chunks[-1], DitGeometry())


def checked_windows(
    window: Window, dit: DitGeometry, vocoder: VocoderGeometry, *, shared: bool
) -> tuple[SpeechWindows, int]:
    """The windows that ``window`` names, and the mel frames around each that the vocoder sees.

    Args:
        shared: DiT and vocoder share the processor's cores, so windows may be longer where speech is behind. Engines
            are built for no longer ones.

    Raises:
        UsageError: an unknown name, or windows that do not fit this DiT and vocoder.
    """
    if window in get_args(_Name):
        window = SpeechWindows(behind=BEHIND_CODES if shared else None)
    if not isinstance(window, SpeechWindows):
        raise UsageError(f"window is {window!r}; {', '.join(get_args(_Name))} or a SpeechWindows was expected")
    block, behind = dit.block_codes, () if window.behind is None else (window.behind,)
    for name, chunks in (("chunks", window.chunks), ("behind", behind)):
        if not window.chunks or not all(isinstance(new, int) and new > 0 and new % block == 0 for new in chunks):
            raise UsageError(
                f"SpeechWindows.{name} is {getattr(window, name)!r}; multiples of {block} codes, the DiT's attention "
                "block, were expected"
            )
    most = vocoder.context_frames
    least, context = min(_LEAST_CONTEXT, most), most if window.vocoder_context is None else window.vocoder_context
    if not isinstance(context, int) or not least <= context <= most:
        raise UsageError(f"SpeechWindows.vocoder_context is {context!r}; {least} to {most} mel frames were expected")
    return window, context
