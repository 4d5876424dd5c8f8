"""Workloads of the benchmark's stages: inputs drawn with a fixed seed, run by the runtime's own code.

A stage is a sequence of jobs. A job holds what it was made from, so that something else can be given the very same
(``Rival``) and be timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, BackendWrapper, Graph
from ..bundle.graph_spec import DTYPES
from ..bundle.parts import PARTS
from ..bundle.reader import Bundle
from ..concurrency.timing import StageTimer
from ..errors import UsageError
from ..generation.decoder import Decoder
from ..generation.encoders import Encoders
from ..media.image import image_input
from ..media.log_mel import chunk_mel, log_mel
from ..speech.kept_blocks import nothing_before
from .results import measured_parts

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Inputs of the stages. The defaults are what docs/results/bench.md shows.

    Attributes:
        audio: seconds of sound. images: height and width in pixels. prefill: tokens.
        context: live tokens of a decoding step. codes: of a DiT evaluation. frames: mel frames of a vocoder run.
        text_tokens, speech_codes: of the whole reply.
    """

    audio: tuple[int, ...] = (2, 30)
    images: tuple[tuple[int, int], ...] = ((384, 512), (768, 1024))
    prefill: tuple[int, ...] = (128, 512)
    context: tuple[int, ...] = (128, 1024, 4096)
    codes: tuple[int, ...] = (60, 250)
    frames: tuple[int, ...] = (116, 250)
    text_tokens: int = 40
    speech_codes: int = 250


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to time.

    Attributes:
        run: does it once; its result is compared with the rival's.
        profiled: the same over a graph that is given, for counting.
        given: what it is made from, by name.
        cache_bytes: live part of the KV cache, which is read as well.
        grows: the jobs of its stage are the same step, ``size`` being what it has to look back on.
        stage, graph: what it belongs to, and the graph that it runs.
    """

    name: str
    size: int
    of: str
    count: float
    unit: str
    run: Callable[[], Array]
    profiled: Callable[[Graph], object]
    given: dict[str, Any] = field(default_factory=dict)
    cache_bytes: int = 0
    grows: bool = False
    stage: str = ""
    graph: str = ""


class Rival(Protocol):
    """What a bundle is measured beside."""

    #: its name and the distributions whose versions matter
    name: str
    libraries: tuple[str, ...]

    def runner(self, job: Job) -> Callable[[], Array] | None:
        """Does the same as ``job.run``; None if it has nothing to set against it."""

    def reply(self, prompt_ids: NDArray[np.int64], text_tokens: int, codes: int) -> tuple[float, float]:
        """A whole spoken reply: seconds until its waveform is there, and seconds of sound in it."""

    def release(self) -> None:
        """Free what the last stage needed."""


#: makes the jobs of a stage, smallest first, for the graph of that name
Maker = Callable[[str, Bundle, Backend, Sizes], Iterator[Job]]

_MAKERS: dict[str, Maker] = {}


def workload(stage: str) -> Callable[[Maker], Maker]:
    """Decorate what makes the jobs of a stage. A stage without measures steps of a decoder, or one typical call."""

    def keep(maker: Maker) -> Maker:
        _MAKERS[stage] = maker
        return maker

    return keep


def stage_jobs(stage: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    """The jobs of a stage, smallest first. Each is prepared when it is asked for.

    Raises:
        UsageError: the bundle has no graph for this stage.
    """
    part = measured_parts()[stage]
    if part.name not in bundle.manifest.graphs:
        raise UsageError(
            f"stage {stage!r} needs the graph {part.name!r}, which {bundle.root} does not have (it has "
            f"{', '.join(bundle.manifest.graphs)}); leave it out with --stages"
        )
    maker = _MAKERS.get(stage) or (_decode if part.decodes else _call)
    return (replace(job, stage=stage, graph=part.name) for job in maker(part.name, bundle, backend, sizes))


def _call(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    """One call at the typical shape of the graph's spec: random numbers, and zeros for what is no float."""
    spec, rng = bundle.manifest.graphs[graph], np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.sized(spec.dims, "opt")
        floats = tensor.dtype == "float32"
        feeds[tensor.name] = rng.standard_normal(shape, np.float32) if floats else np.zeros(shape, tensor.dtype)

    def run(given: Graph | None = None) -> Array:
        return (given or backend.graph(graph)).run(feeds)[PARTS[graph].output]

    yield Job(
        name="typical",
        size=1,
        of="calls",
        count=1,
        unit="call",
        run=run,
        profiled=run,
        given={"feeds": feeds},
    )


@workload("audio_encoder")
def _audio(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    frontend = bundle.manifest.audio
    for seconds in sizes.audio:
        rng = np.random.default_rng(seconds)
        mel = log_mel((0.1 * rng.standard_normal(frontend.sampling_rate * seconds)).astype(np.float32), frontend)
        chunks, frames = chunk_mel(mel, frontend)
        pieces = seconds * frontend.sampling_rate / (frontend.hop_length * frontend.chunk_frames)

        def run(backend: Backend = backend, chunks: Any = chunks, frames: Any = frames) -> Array:
            return Encoders(backend, StageTimer()).audio(chunks, frames)

        yield Job(
            name=f"{seconds} s",
            size=seconds,
            of="seconds of sound",
            count=pieces,
            unit="chunk of 2 s",
            run=run,
            profiled=lambda graph, run=run: run(_OneGraphBackend(backend, graph)),  # type: ignore[misc]
            given={"mel": mel},
        )


@workload("vision_encoder")
def _vision(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    for height, width in sizes.images:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        vision = image_input(pixels, bundle.manifest.vision)

        def run(backend: Backend = backend, vision: Any = vision) -> Array:
            return Encoders(backend, StageTimer()).vision(vision)

        yield Job(
            name=f"{width}x{height}",
            size=len(vision.window_valid),
            of="attention windows",
            count=1,
            unit="image",
            run=run,
            profiled=lambda graph, run=run: run(_OneGraphBackend(backend, graph)),  # type: ignore[misc]
            given={"vision": vision},
        )


def _embeddings(bundle: Bundle, graph: str, count: int) -> NDArray[np.float32]:
    """Embeddings [count, E] of tokens drawn from the decoder's own table."""
    table = bundle.embedding(graph)
    return table.rows(np.random.default_rng(0).integers(0, table.vocab_size, count))


def _positions(start: int, stop: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(start, stop)[None], 3, axis=0)


def _cache_bytes(bundle: Bundle, graph: str, tokens: int) -> int:
    geometry = bundle.manifest.decoders[graph]
    row = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
    return row * tokens * DTYPES[bundle.manifest.kv.dtype]


def _fitting(bundle: Bundle, lengths: tuple[int, ...]) -> list[int]:
    """Those that the KV cache holds."""
    return [length for length in lengths if length <= bundle.manifest.kv.max_context]


@workload("prefill")
def _prefill(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    lengths = _fitting(bundle, sizes.prefill)
    rows = _embeddings(bundle, graph, max(lengths))
    decoder = _decoder(backend.graph(graph), max(lengths))
    for length in lengths:

        def run(decoder: Decoder = decoder, length: int = length) -> Array:
            decoder.truncate(0)
            return decoder.forward(rows[:length], _positions(0, length))[0]

        yield Job(
            name=str(length),
            size=length,
            of="tokens",
            count=length,
            unit="token",
            run=run,
            profiled=lambda graph, run=run, length=length: run(_decoder(graph, length)),  # type: ignore[misc]
            given={"rows": rows[:length], "context": 0},
            cache_bytes=_cache_bytes(bundle, graph, length),
        )


@workload("decode")
def _decode(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    """One step at each context, over a cache that was filled by prefilling: memory that was never written to is not
    memory that has to be read. Steps may be run in any order once all are there: each writes what it finds."""
    lengths = _fitting(bundle, sizes.context)
    rows = _embeddings(bundle, graph, max(lengths))
    decoder = _decoder(backend.graph(graph), max(lengths))
    for length in lengths:
        decoder.forward(rows[decoder.length : length - 1], _positions(decoder.length, length - 1))

        def run(decoder: Decoder = decoder, length: int = length) -> Array:
            decoder.length = length - 1
            return decoder.forward(rows[length - 1 : length], _positions(length - 1, length))[0]

        def profiled(given: Graph, length: int = length, run: Callable[..., Array] = run) -> Array:
            other = _decoder(given, length)
            other.length = length - 1  # what lies in the cache does not change what there is to do
            return run(other)

        yield Job(
            name=str(length),
            size=length,
            of="tokens in context",
            count=1,
            unit="code" if PARTS[graph].speaks else "token",
            run=run,
            profiled=profiled,
            given={"rows": rows[:length], "context": length - 1},
            cache_bytes=_cache_bytes(bundle, graph, length),
            grows=True,
        )
        decoder.truncate(length - 1)


def _decoder(graph: Graph, capacity: int) -> Decoder:
    return Decoder(graph, graph.new_cache(capacity))


@workload("dit")
def _dit(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    geometry = bundle.manifest.dit
    assert geometry is not None
    voice = bundle.voice()
    for count in sizes.codes:
        rng = np.random.default_rng(count)
        feeds = {
            "x": rng.standard_normal((1, count * geometry.repeats, geometry.mel_dim), np.float32),
            "codes": rng.integers(0, geometry.num_embeds, (1, count)),
            "step": np.asarray([1], np.int64),
            **voice.feeds(),
            **nothing_before(geometry),
        }

        def run(given: Graph | None = None, feeds: Any = feeds) -> Array:
            return (given or backend.graph(graph)).run(feeds)["velocity"]

        yield Job(
            name=f"{count} codes",
            size=count,
            of="codes",
            count=1,
            unit="evaluation",
            run=run,
            profiled=run,
            given={"feeds": feeds, "voice": voice.spec.name},
        )


@workload("bigvgan")
def _bigvgan(graph: str, bundle: Bundle, backend: Backend, sizes: Sizes) -> Iterator[Job]:
    vocoder, dit = bundle.manifest.vocoder, bundle.manifest.dit
    assert vocoder is not None
    assert dit is not None
    for frames in sizes.frames:
        mel = np.random.default_rng(frames).normal(-5, 2, (1, dit.mel_dim, frames)).astype(np.float32)
        seconds = frames * vocoder.hop / vocoder.sample_rate

        def run(given: Graph | None = None, mel: Any = mel) -> Array:
            return (given or backend.graph(graph)).run({"mel": mel})["wav"]

        yield Job(
            name=f"{frames} frames",
            size=frames,
            of="mel frames",
            count=seconds,
            unit="s of sound",
            run=run,
            profiled=run,
            given={"mel": mel},
        )


class _OneGraphBackend(BackendWrapper):
    """A backend that gives one graph, whatever is asked for."""

    def __init__(self, inner: Backend, graph: Graph) -> None:
        super().__init__(inner)
        self._graph = graph

    def graph(self, name: str) -> Graph:
        return self._graph
