"""Options shared by several commands, and sampling options applied to a bundle's defaults."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omniport.runtime.backends import BACKENDS

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


BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder, as written by omniport export.")]
BackendOption = Annotated[str, one_of(BACKENDS, help="What runs the graphs.")]
SystemOption = Annotated[
    str | None, typer.Option(help="System message; without it the one that the talker was trained with is used.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of sampling and of the speech's noise.")]
GreedyFlag = Annotated[bool, typer.Option("--greedy", help="Pick the likeliest token, in speech too.")]


def sampling(
    manifest: Manifest, greedy: bool, max_new_tokens: int | None, max_speech: float | None
) -> tuple[SamplingConfig, SamplingConfig | None]:
    """How thinker and talker sample; None for a bundle that cannot speak.

    Args:
        greedy: pick the likeliest token.
        max_new_tokens: text tokens at most. max_speech: seconds of speech at most.
    """
    import msgspec

    def config(base: SamplingConfig, most: int | None) -> SamplingConfig:
        if greedy:
            base = msgspec.structs.replace(base, temperature=0.0)
        return base if most is None else msgspec.structs.replace(base, max_new_tokens=most)

    thinker = config(manifest.thinker_sampling, max_new_tokens)
    if manifest.talker_sampling is None or manifest.dit is None:
        return thinker, None
    codes = None if max_speech is None else max(1, round(max_speech * manifest.dit.codec_hz))
    return thinker, config(manifest.talker_sampling, codes)
