"""A backend of small deterministic functions in place of graphs, for tests of everything around them.

Shapes, dtypes and the use of the cache are checked on every call. Outputs depend on what a real graph's would: a
decoder's on the whole live cache and the positions, the DiT's and the vocoder's on what is near. Sums are float64 and
rounded once, so that results do not depend on the order in which a BLAS kernel adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Array, Backend, Graph, KvCache, Outputs, RunHandle
from omniport.runtime.bundle.manifest import DecoderGeometry, Manifest
from omniport.runtime.errors import BackendError


class FakeGraph(Graph):
    """Base: records the feeds of every call in ``calls``; subclasses compute."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Array]] = []

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        """Check that feeds are as the contract asks, record copies, compute."""
        for name, array in feeds.items():
            assert isinstance(array, np.ndarray), name
            assert array.flags.c_contiguous, name
            assert array.dtype in (np.float32, np.int64, np.bool_), f"{name} is {array.dtype}"
        self.calls.append({name: array.copy() for name, array in feeds.items()})
        return self.compute(feeds, cache)

    def compute(self, feeds: Mapping[str, Array], cache: KvCache | None) -> Outputs:
        """The function; ``cache`` is None but for decoders."""
        raise NotImplementedError


class FakeCache:
    """Keeps the embeddings themselves, [capacity, E], filled with NaN so that a read of a stale row shows."""

    def __init__(self, capacity: int, width: int) -> None:
        self.rows = np.full((capacity, width), np.nan, np.float32)
        self.prompt = 0

    @property
    def capacity(self) -> int:
        """Tokens the cache holds."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.rows.nbytes


class FakeDecoder(FakeGraph):
    """Thinker or talker.

    Args:
        geometry: sizes.
        hidden: also give ``hidden`` (thinker).
        script: tokens that greedy sampling shall pick, in order; what the function gives after them.
    """

    def __init__(self, geometry: DecoderGeometry, hidden: bool, script: Sequence[int] = (), seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        width, inner = geometry.embedding_size, geometry.hidden_size
        self._geometry = geometry
        self._hidden = hidden
        self._context = rng.standard_normal((width, inner))
        self._own = rng.standard_normal((width, inner))
        self._head = rng.standard_normal((inner, geometry.vocab_size))
        self.script = list(script)
        self.hidden_rows: list[NDArray[np.float32]] = []

    def new_cache(self, capacity: int) -> FakeCache:
        """A cache for ``capacity`` tokens."""
        return FakeCache(capacity, self._geometry.embedding_size)

    def compute(self, feeds: Mapping[str, Array], cache: KvCache | None) -> Outputs:
        """hidden [1, S, H] from the mean of all rows so far, each token's own row and its positions."""
        assert isinstance(cache, FakeCache)
        assert feeds.keys() == {"inputs_embeds", "position_ids", "kv_positions", "write_index"}
        embeds, positions = feeds["inputs_embeds"], feeds["position_ids"]
        (start,), count = feeds["write_index"], embeds.shape[1]
        assert embeds.shape == (1, count, self._geometry.embedding_size)
        assert positions.shape == (3, 1, count)
        assert feeds["kv_positions"].tolist() == list(range(start + count))
        cache.rows[start : start + count] = embeds[0]
        if count > 1 or start == 0 or start < cache.prompt:
            cache.prompt = int(start) + count
        live = cache.rows[: start + count].astype(np.float64)
        assert np.isfinite(live).all(), "a cache row that was never written"
        mean = np.cumsum(live, axis=0)[start:] / np.arange(start + 1, start + count + 1)[:, None]
        turn = np.sin(positions[:, 0].astype(np.float64) * [[0.1], [0.2], [0.3]]).sum(axis=0)[:, None]
        hidden = np.tanh(mean @ self._context + embeds[0].astype(np.float64) @ self._own + turn).astype(np.float32)
        self.hidden_rows.extend(hidden)
        logits = (hidden[-1:].astype(np.float64) @ self._head).astype(np.float32)
        step = int(start) + count - cache.prompt
        if step < len(self.script):
            logits[0, self.script[step]] = 1e3
        return {"logits": logits, "hidden": hidden[None]} if self._hidden else {"logits": logits}


class FakeEncoder(FakeGraph):
    """Audio or vision encoder: means of what one embedding covers, projected."""

    def __init__(self, kind: str, inner: int, width: int, seed: int = 0) -> None:
        super().__init__()
        self._audio = kind == "audio"
        self._weight = np.random.default_rng(seed).standard_normal((inner, width))

    def compute(self, feeds: Mapping[str, Array], cache: KvCache | None) -> Outputs:
        """Audio: mel [C, n_mels, F] -> [C, F/4, H]. Vision: patches [T, N, P] -> [T*N/4, H]."""
        if self._audio:
            clips, mels, frames = feeds["mel"].shape
            assert (feeds["frames"] <= frames).all()
            means = feeds["mel"].reshape(clips, mels, frames // 4, 4).mean(-1, dtype=np.float64).transpose(0, 2, 1)
        else:
            count, patches, values = feeds["patches"].shape
            assert feeds["grid_hw"].shape == (patches, 2)
            assert feeds["window_index"].shape == (feeds["window_valid"].size,)
            means = feeds["patches"].reshape(count * patches // 4, 4, values).mean(1, dtype=np.float64)
        return {"embeds": (means @ self._weight).astype(np.float32)}


class FakeDit(FakeGraph):
    """A flow whose end at each mel frame depends on its noise, its code and the voice alone."""

    def __init__(self, mel_dim: int, repeats: int, codes: int, seed: int = 0) -> None:
        super().__init__()
        self._repeats = repeats
        self._target = np.random.default_rng(seed).standard_normal((codes, mel_dim)).astype(np.float32)

    def compute(self, feeds: Mapping[str, Array], cache: KvCache | None) -> Outputs:
        """x [1, T, mel_dim] -> velocity [1, T, mel_dim]."""
        x, codes = feeds["x"], feeds["codes"]
        assert x.shape == (1, codes.shape[1] * self._repeats, self._target.shape[1])
        assert feeds["step"].shape == (1,)
        voice = feeds["speaker"].mean() + feeds["reference"].mean()
        target = np.repeat(self._target[codes[0]], self._repeats, axis=0)[None]
        pull = np.float32(0.5 + 0.01 * feeds["step"][0])
        return {"velocity": (target + voice - x) * pull}


class FakeBigVgan(FakeGraph):
    """A vocoder that sees ``left`` and ``right`` mel frames around each sample, and nothing past the edges.

    A window's look-ahead gives 24 on its right; the samples behind it, which the next window goes over from, have 23.
    """

    def __init__(self, mel_dim: int, hop: int, left: int = 34, right: int = 23, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self._hop, self._left, self._right = hop, left, right
        self._mix = rng.standard_normal(mel_dim) / mel_dim
        self._taps = rng.standard_normal(left + right + 1)
        self._phase = rng.standard_normal(hop)

    def compute(self, feeds: Mapping[str, Array], cache: KvCache | None) -> Outputs:
        """mel [1, mel_dim, T] -> wav [1, hop * T]; each sample by the same operations wherever the window starts."""
        mel = feeds["mel"][0].astype(np.float64)
        frames = mel.shape[1]
        level = np.zeros(frames + self._left + self._right)
        for channel, weight in zip(mel, self._mix, strict=True):
            level[self._left : self._left + frames] += weight * channel
        mixed = np.zeros(frames)
        for k, tap in enumerate(self._taps):
            mixed += tap * level[k : k + frames]
        wave = np.tanh(mixed[:, None] * 0.1 + 0.05 * self._phase[None])
        return {"wav": wave.reshape(1, -1).astype(np.float32)}


class FakeBackend(Backend):
    """Fake graphs of a manifest's sizes.

    Args:
        graphs: replaces graphs by name.
        room: what ``at_once`` says.
    """

    name = "fake"

    def __init__(self, manifest: Manifest, graphs: Mapping[str, Graph] | None = None, room: int | None = None) -> None:
        audio, vision, thinker = manifest.audio, manifest.vision, manifest.thinker
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        self.graphs: dict[str, Graph] = {
            "audio_encoder": FakeEncoder("audio", audio.n_mels, thinker.embedding_size, seed=1),
            "vision_encoder": FakeEncoder("vision", patch, thinker.embedding_size, seed=2),
            "thinker": FakeDecoder(thinker, hidden=True, seed=3),
        }
        if manifest.talker and manifest.dit and manifest.vocoder:
            dit = manifest.dit
            self.graphs["talker"] = FakeDecoder(manifest.talker, hidden=False, seed=4)
            self.graphs["dit"] = FakeDit(dit.mel_dim, dit.repeats, dit.num_embeds + 1, seed=5)
            self.graphs["bigvgan"] = FakeBigVgan(dit.mel_dim, manifest.vocoder.hop, seed=6)
        self.graphs.update(graphs or {})
        self.room = room
        self.closed = False

    def graph(self, name: str) -> Graph:
        """The graph of that name.

        Raises:
            BackendError: there is none, or the backend is closed.
        """
        if self.closed or name not in self.graphs:
            raise BackendError(f"no graph {name!r}; there are {', '.join(self.graphs)}, closed: {self.closed}")
        return self.graphs[name]

    def at_once(self) -> int | None:
        return self.room

    def close(self) -> None:
        """Refuse further use."""
        self.closed = True
