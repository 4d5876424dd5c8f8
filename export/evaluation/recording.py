"""Backends for evaluation: one records graph calls, one answers them with the reference's results.

When the session runs over `ReplayBackend`, every difference comes from the host code: no graph of the bundle runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import (
    Array,
    Backend,
    BackendWrapper,
    Graph,
    GraphWrapper,
    KvCache,
    Outputs,
    RunHandle,
)
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.parts import decoders, encoder_of, giving
from omniport.runtime.errors import OmniportError

from ..validation.reference_reply import StagedReply
from ..validation.reference_speech import Floats

Feeds = Mapping[str, Array]


class RecordedGraph(GraphWrapper):
    """A graph that records its inputs (``calls``) and its outputs (``given``)."""

    def __init__(self, inner: Graph) -> None:
        super().__init__(inner)
        self.calls: list[dict[str, Array]] = []
        self.given: list[Outputs] = []

    def run(self, feeds: Feeds, cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        self.calls.append({name: np.array(value) for name, value in feeds.items()})
        outputs = super().run(feeds, cache, handle)
        self.given.append(outputs)
        return outputs


class RecordingBackend(BackendWrapper):
    """A backend whose graphs record. Closing it leaves the inner backend open."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.graphs: dict[str, RecordedGraph] = {}

    def graph(self, name: str) -> RecordedGraph:
        if name not in self.graphs:
            self.graphs[name] = RecordedGraph(super().graph(name))
        return self.graphs[name]

    def close(self) -> None:
        """Forget the records."""
        self.graphs.clear()


def consumed(graph: RecordedGraph) -> tuple[Floats, NDArray[np.int64]]:
    """A decoder's inputs over all calls: embeddings [n, E] and positions [3, n]."""
    embeds = np.concatenate([call["inputs_embeds"][0] for call in graph.calls])
    return embeds, np.concatenate([call["position_ids"][:, 0] for call in graph.calls], axis=1)


@dataclass(frozen=True)
class _NoCache:
    capacity: int
    nbytes: int = 0


class _ScriptedGraph(Graph):
    def __init__(self, answer: Callable[[Feeds], Outputs]) -> None:
        self._answer = answer

    def run(self, feeds: Feeds, cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        return self._answer(feeds)

    def new_cache(self, capacity: int) -> KvCache:
        return _NoCache(capacity)


class ScriptedBackend(Backend):
    """Graphs that are functions of their feeds, recorded."""

    name = "scripted"

    def __init__(self, answers: Mapping[str, Callable[[Feeds], Outputs]]) -> None:
        self.graphs = {name: RecordedGraph(_ScriptedGraph(answer)) for name, answer in answers.items()}

    def graph(self, name: str) -> RecordedGraph:
        return self.graphs[name]

    def close(self) -> None:
        """Nothing is held."""


class ReplayBackend(ScriptedBackend):
    """Answers a session that gives the conversation of ``reply`` with what the reference computed for it.

    Raises (from graphs):
        OmniportError: the runtime asks for more than the reference computed.
    """

    name = "reference"

    def __init__(self, reply: StagedReply, manifest: Manifest) -> None:
        self._reply = reply
        self._manifest = manifest
        self._taken: dict[str, int] = {}
        super().__init__(
            {
                encoder_of("audio").name: self._audio,
                encoder_of("image").name: self._vision,
                **dict(zip((part.name for part in decoders()), (self._thinker, self._talker), strict=False)),
                giving("velocity").name: self._flow,
                giving("wav").name: self._vocoder,
            }
        )

    def _take(self, what: str, count: int, held: int) -> slice:
        start = self._taken.get(what, 0)
        if start + count > held:
            raise OmniportError(f"the runtime asks for {start + count} rows of {what}; the reference has {held}")
        self._taken[what] = start + count
        return slice(start, start + count)

    def _audio(self, feeds: Feeds) -> Outputs:
        rows = self._reply.features.get("audio", np.zeros((0, 1), np.float32))
        embeds = np.zeros((len(feeds["frames"]), self._manifest.audio.chunk_tokens, rows.shape[1]), np.float32)
        for chunk, frames in zip(embeds, feeds["frames"], strict=True):
            count = ((int(frames) - 1) // 2 + 1) // 2
            chunk[:count] = rows[self._take("audio features", count, len(rows))]
        return {"embeds": embeds}

    def _vision(self, feeds: Feeds) -> Outputs:
        """Images and videos come in the order of the prompt; the reference keeps the two kinds apart."""
        rows = self._vision_rows()
        merge = self._manifest.vision.merge_size
        steps, patches = feeds["patches"].shape[:2]
        return {"embeds": rows[self._take("vision features", steps * patches // merge**2, len(rows))].copy()}

    def _vision_rows(self) -> Floats:
        inputs, merge = self._reply.inputs, self._manifest.vision.merge_size
        left = {kind: iter(self._blocks(kind, merge)) for kind in ("image", "video")}
        rows = [next(left[kind]) for kind in inputs.kinds if kind in left]
        return np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)

    def _blocks(self, kind: str, merge: int) -> list[Floats]:
        """Features of each medium of a kind."""
        grid = self._reply.inputs.features.get(f"{kind}_grid_thw")
        if grid is None:
            return []
        counts = (grid.prod(dim=1) // merge**2).tolist()
        return np.split(self._reply.features[kind], np.cumsum(counts)[:-1])

    def _thinker(self, feeds: Feeds) -> Outputs:
        trace = self._reply.thinker
        assert trace is not None
        count = feeds["inputs_embeds"].shape[1]
        piece = self._take("thinker hidden states", count, len(trace.hidden))
        logits = _after(trace.logits, piece.stop - len(self._reply.inputs.token_ids))
        return {"logits": logits, "hidden": trace.hidden[None, piece].copy()}

    def _talker(self, feeds: Feeds) -> Outputs:
        trace = self._reply.talker
        assert trace is not None
        piece = self._take("talker steps", feeds["inputs_embeds"].shape[1], len(trace.embeds))
        return {"logits": _after(trace.logits, piece.stop - len(trace.history))}

    def _flow(self, feeds: Feeds) -> Outputs:
        solve = self._reply.solve
        assert solve is not None
        velocity = solve.velocity[self._take("velocities", 1, len(solve.velocity))]
        if velocity.shape != feeds["x"].shape:
            raise OmniportError(f"the runtime solves for {feeds['x'].shape}; the reference for {velocity.shape}")
        return {"velocity": velocity.copy()}

    def _vocoder(self, feeds: Feeds) -> Outputs:
        """The reference's waveform for a whole mel; silence for any other."""
        vocoder, wave = self._manifest.vocoder, self._reply.waveform
        assert vocoder is not None
        count = vocoder.hop * feeds["mel"].shape[2]
        same = wave is not None and len(wave) == count
        return {"wav": wave[None].copy() if same and wave is not None else np.zeros((1, count), np.float32)}


def _after(logits: Floats, index: int) -> Floats:
    """Logits [1, V] after the prompt (0) or a generated token; zeros inside the prompt, where nobody reads them."""
    return logits[None, index].copy() if 0 <= index < len(logits) else np.zeros_like(logits[:1])
