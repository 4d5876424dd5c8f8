"""Options shared by several commands, and what they ask of a reply."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omniport.runtime.backends import BACKENDS
from omniport.runtime.backends.registry import COMPUTE
from omniport.runtime.speech.ode_methods import CHOICES

if TYPE_CHECKING:
    from omniport.runtime.bundle.manifest import Manifest, SamplingConfig


def one_of(words: Iterable[str], **options: Any) -> Any:
    """An option that takes one of these words."""
    known = tuple(words)

    def parse(word: str) -> str:
        if word not in known:
            raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, known))}.")
        return word

    return typer.Option(parser=parse, metavar="|".join(known), **options)


#: nobody means a number beyond it, and there seconds overflow in clocks and counts of samples
_MOST = 1e9


def number(metavar: str, least: float = -_MOST, most: float = _MOST, **options: Any) -> Any:
    """An option that takes a number; infinity and NaN, which Python reads as numbers, are none."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a number.") from None
        if not least <= value <= most:  # NaN is neither
            raise typer.BadParameter(f"{text} is not in the range {least:g} to {most:g}.")
        return value

    return typer.Option(parser=parse, metavar=metavar, **options)


BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder, as written by omniport export.")]
BackendOption = Annotated[str, one_of(BACKENDS, help="What runs the graphs.")]
ComputeOption = Annotated[
    str | None,
    one_of(COMPUTE, help="Compute float32 graphs in bfloat16 (openvino, and auto on a CPU): faster, less exact."),
]
SystemOption = Annotated[
    str | None, typer.Option(help="System message; without it the one that the talker was trained with is used.")
]
SolverOption = Annotated[
    str,
    one_of(
        CHOICES,
        help="Solver of speech: rk4 as the reference; the others faster and less exact; auto: the most exact that is "
        "in time on this machine.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of sampling and of the speech's noise.")]
VoiceOption = Annotated[str | None, typer.Option(help="Voice of spoken replies (see omniport voices).")]
MaxNewTokensOption = Annotated[int | None, typer.Option(min=1, help="Text tokens of a reply at most.")]
MaxSpeechOption = Annotated[float | None, number("SECONDS", 0.1, help="Seconds of speech of a reply at most.")]
MaxPixelsOption = Annotated[
    int | None, typer.Option(min=784, help="Pixels of a picture, and of a video's frame, at most; larger ones shrink.")
]
FpsOption = Annotated[float | None, number("FPS", 0.001, help="Frames a second that are shown of a video.")]
MaxFramesOption = Annotated[int | None, typer.Option(min=2, help="Frames that are shown of a video at most.")]
ImagesOption = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Image to send; may be repeated.")]
VideosOption = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Video to send; may be repeated.")]
GreedyFlag = Annotated[bool, typer.Option("--greedy", help="Pick the likeliest token, in speech too.")]


def reply_options(
    manifest: Manifest,
    *,
    greedy: bool = False,
    max_new_tokens: int | None = None,
    max_speech: float | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Keyword arguments of ``OmniSession.reply`` and ``turn``: the bundle's own sampling, as the options change it.

    Args:
        greedy: pick the likeliest token.
        max_new_tokens: text tokens at most. max_speech: seconds of speech at most.
        others: go along as they are.
    """
    import msgspec

    def config(base: SamplingConfig, most: int | None) -> SamplingConfig:
        changes: dict[str, Any] = {"temperature": 0.0} if greedy else {}
        return msgspec.structs.replace(base, **changes, **({} if most is None else {"max_new_tokens": most}))

    options = {"thinker": config(manifest.thinker_sampling, max_new_tokens), **others}
    if manifest.talker_sampling is not None and manifest.dit is not None:
        codes = None if max_speech is None else max(1, round(max_speech * manifest.dit.codec_hz))
        options["talker"] = config(manifest.talker_sampling, codes)
    return options
