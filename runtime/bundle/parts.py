"""The registry of model parts: what the runtime has to know of each, such as its output and its media.

Code that treats parts differently asks the part; there are no other tables of parts.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: of the graph, of its files, and of the part's stage in a reply's timing.
        output: the output that counts where results are compared.
        media: kinds of media that it turns into embeddings.
        decodes: it is a language model: it has a KV cache, a table of token embeddings, and a `DecoderGeometry` of its
            name in the manifest.
        speaks: replies that are only read do without it.
        often: it runs hundreds of times a reply.
        benchmarks: stages of a benchmark that measure it, where that is not one of its own name.
        float32: published in float32, as which it stays in the half precisions unless it is asked otherwise.
    """

    name: str
    output: str
    _: KW_ONLY
    media: tuple[str, ...] = ()
    decodes: bool = False
    speaks: bool = False
    often: bool = False
    benchmarks: tuple[str, ...] = ()
    float32: bool = False

    @property
    def team(self) -> str:
        """Parts of one team are used together; different teams one after the other."""
        return "encoders" if self.media else "decoders" if self.decodes else "speech" if self.speaks else self.name


#: by name, in the order in which a reply comes about
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("audio_encoder", "embeds", media=("audio",)),
        Part("vision_encoder", "embeds", media=("image", "video")),
        Part("thinker", "logits", decodes=True, often=True, benchmarks=("prefill", "decode")),
        Part("talker", "logits", decodes=True, speaks=True, often=True),
        Part("dit", "velocity", speaks=True, often=True, benchmarks=("dit", "solver"), float32=True),
        Part("bigvgan", "wav", speaks=True, float32=True),
    )
}


def encoder_of(kind: str) -> Part:
    """The part that encodes media of a kind: ``audio``, ``image`` or ``video``."""
    return next(part for part in PARTS.values() if kind in part.media)


def decoders() -> tuple[Part, ...]:
    """The language models; the first of them writes the reply."""
    return tuple(part for part in PARTS.values() if part.decodes)


def speech_parts() -> tuple[Part, ...]:
    """The parts that a reply takes only if it is spoken."""
    return tuple(part for part in PARTS.values() if part.speaks)


def giving(output: str) -> Part:
    """The part that gives an output which only one part gives: ``velocity`` of the mel, or ``wav``."""
    (part,) = (part for part in PARTS.values() if part.output == output)
    return part
