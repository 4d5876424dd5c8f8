"""Helpers of the tests of replies and turns: a session over fake graphs, media in pieces, events sorted."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from omniport.runtime import AudioChunk, Done, Event, OmniSession, TextDelta, Turn, TurnsDropped
from omniport.runtime.backends.base import Array, Graph, GraphWrapper, KvCache, Outputs, RunHandle
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.generation.conversation import Conversation
from omniport.runtime.media.audio import open_av, read_track
from omniport.runtime.media.limits import Sampling
from omniport.runtime.prompt.builder import Prompt, build_prompt
from support.fake_backend import FakeBackend, FakeDecoder


class Live:
    """A session over fake graphs, with its decoders at hand. ``room``: graph runs at once; any number if None."""

    def __init__(self, root: Path, room: int | None = None, **changes: Any) -> None:
        self.bundle = Bundle.open(root)
        self.backend = FakeBackend(self.bundle.manifest, changes, room)
        self.session = OmniSession(self.bundle, self.backend)
        self.stop = self.bundle.manifest.chat.stop[0]

    def decoder(self, name: str) -> FakeDecoder:
        graph = self.backend.graphs[name]
        assert isinstance(graph, FakeDecoder)
        return graph

    @property
    def conversation(self) -> Conversation:
        """The session's."""
        return self.session._conversation

    def encode(self, text: str) -> list[int]:
        return self.session.text_codec.encode(text)

    def script(self, text: str, codes: list[int] | None = None, stop: bool = True) -> None:
        """Let the thinker say ``text`` and the talker ``codes``, greedily."""
        self.decoder("thinker").script = self.encode(text) + ([self.stop] if stop else [])
        if codes is not None:
            self.decoder("talker").script = codes

    def prompt(self, messages: list[dict[str, Any]]) -> Prompt:
        return build_prompt(messages, self.session.manifest, self.session.text_codec)

    def ask(self, text: str, **options: Any) -> Turn:
        """A turn with this question, not committed yet."""
        turn = self.session.turn(**options)
        turn.push_text(text)
        return turn

    def say(self, text: str, **options: Any) -> tuple[list[TextDelta], NDArray[np.float32], Done, list[TurnsDropped]]:
        """The answer to a question, sorted."""
        return sort(self.ask(text, **options).commit())

    def fed(self, name: str) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Embeddings [E] and positions [3] of the live cache of the last call, token by token."""
        rows: dict[int, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
        for call in self.decoder(name).calls:
            (start,) = call["write_index"]
            for k in range(call["inputs_embeds"].shape[1]):
                rows[int(start) + k] = call["inputs_embeds"][0, k], call["position_ids"][:, 0, k]
        last = self.decoder(name).calls[-1]
        return [rows[k] for k in range(len(last["kv_positions"]))]


def assert_fed_alike(got: Live, wanted: Live) -> None:
    """Both decoders of one session were fed what those of the other were, token by token."""
    for name in ("thinker", "talker"):
        a, b = got.fed(name), wanted.fed(name)
        np.testing.assert_array_equal([p for _, p in a], [p for _, p in b])
        np.testing.assert_allclose([e for e, _ in a], [e for e, _ in b], rtol=1e-5, atol=1e-5)
        assert np.std([e for e, _ in b]) > 0.1


class Gate(GraphWrapper):
    """A graph that stops before its ``at``-th run until it is let go; or raises there."""

    def __init__(self, inner: Graph, at: int = 1, error: BaseException | None = None) -> None:
        super().__init__(inner)
        self.at, self.error = at, error
        self.reached, self.go = threading.Event(), threading.Event()
        self.runs = 0

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        self.runs += 1
        if self.runs == self.at:
            self.reached.set()
            if self.error is not None:
                raise self.error
            assert self.go.wait(20)
        return super().run(feeds, cache, handle)


@contextmanager
def held(graphs: dict[str, Graph], name: str, at: int = 1) -> Iterator[Gate]:
    """While this lasts, a graph stops before its ``at``-th run."""
    gate = Gate(graphs[name], at)
    graphs[name] = gate
    try:
        yield gate
    finally:
        gate.go.set()
        graphs[name] = gate.inner


class Watch:
    """Notes the runs of graphs: their names in order, and which of them ran at the same time."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running: list[str] = []
        self.together: set[tuple[str, ...]] = set()

    @property
    def most(self) -> int:
        """Runs at once."""
        return max(map(len, self.together))


class Watched(GraphWrapper):
    """A graph whose runs are noted, and take ``seconds`` more."""

    def __init__(self, inner: Graph, name: str, watch: Watch, seconds: float = 0.0002) -> None:
        super().__init__(inner)
        self.name, self.watch, self.seconds = name, watch, seconds

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        self.watch.log.append(self.name)
        self.watch.running.append(self.name)
        time.sleep(self.seconds)  # lets the others in, if they may
        self.watch.together.add(tuple(sorted(self.watch.running)))
        try:
            return super().run(feeds, cache, handle)
        finally:
            self.watch.running.remove(self.name)


def start(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Begin work in a thread of its own; its result or error, within a time, is asked of what comes back."""
    pool = ThreadPoolExecutor(1)
    begun = pool.submit(work, *arguments)
    pool.shutdown(wait=False)
    return begun


def sort(events: Iterator[Event]) -> tuple[list[TextDelta], NDArray[np.float32], Done, list[TurnsDropped]]:
    """Text, sound, end, and what was dropped."""
    listed = list(events)
    done = listed.pop()
    assert isinstance(done, Done)
    chunks = [e for e in listed if isinstance(e, AudioChunk)]
    assert [c.index for c in chunks] == list(range(len(chunks)))
    sound = np.concatenate([np.zeros(0, np.float32), *(c.samples for c in chunks)])
    texts = [e for e in listed if isinstance(e, TextDelta)]
    return texts, sound, done, [e for e in listed if isinstance(e, TurnsDropped)]


def pieces(rng: np.random.Generator, total: int, most: int) -> list[slice]:
    """``total`` cut at random, empty pieces among them."""
    cuts = [0]
    while cuts[-1] < total:
        cuts.append(min(total, cuts[-1] + int(rng.integers(0, most))))
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def voice(seconds: float, rate: int = 16000, seed: int = 0) -> NDArray[np.float32]:
    """Noise whose loudest moment comes first, so that the floor of its mel is known from the start."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time)) * (0.3 + 0.2 * np.sin(7 * time))
    noise[: rate // 100] *= 3
    return (0.2 * noise).astype(np.float32)


def film(path: Path, seconds: float, sound: float, fps: int = 10, loud_first: bool = True) -> Path:
    """A clip of changing pictures and ``sound`` seconds of noise (FFV1, PCM: what comes out is what went in)."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=fps)
        video.width, video.height, video.pix_fmt = 84, 56, "bgr0"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono") if sound else None
        for _ in range(max(1, round(seconds * fps))):
            pixels = rng.integers(0, 255, (56, 84, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        container.mux(video.encode())
        if audio is not None:
            samples = voice(sound) if loud_first else voice(sound)[::-1]
            frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def push_film(turn: Turn, path: Path, rng: np.random.Generator, lead: float = 0.0) -> None:
    """Push a clip's frames and sound, its sound in pieces of any size up to ``lead`` seconds ahead of the pictures."""
    with path.open("rb") as file, open_av(file) as container:
        shown = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(container.streams.video[0])]
    samples, rate = np.zeros(0, np.float32), 16000.0
    with path.open("rb") as file, open_av(file) as container:
        if container.streams.audio:
            samples = read_track(container, "sound", rate, origin=shown[0][0])
    done = 0
    for at, pixels in shown:
        until = min(len(samples), max(done, round((at + lead) * rate)))
        for part in pieces(rng, until - done, 3000):
            turn.push_audio(samples[done:][part], rate)
        done = until
        turn.push_frame(pixels, at)
    for part in pieces(rng, len(samples) - done, 9000):
        turn.push_audio(samples[done:][part], rate)


def as_live(frames: int, rate: float, frontend: Any, limits: Any, most: int | None = None) -> Sampling:
    """In the place of ``sample_frames``: a live clip shows the frames on show at 0, 0.5, 1.0 s."""
    instants = np.arange(max(1, math.ceil(frames / rate * 2 - 0.01))) / 2
    indices = np.minimum((instants * rate + 1e-3).astype(np.int64), frames - 1)
    return Sampling(np.append(indices, indices[-1:] * np.ones(len(indices) % 2, np.int64)), 1.0)
