"""Apply a command's sampling options to a bundle's defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omniport.runtime.bundle.manifest import Manifest, SamplingConfig


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
