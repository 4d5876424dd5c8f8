"""Record every graph call of a bundle once, and replay the calls on other bundles (teacher forcing).

The unquantized bundle answers conversations, and every call of every graph is recorded: the thinker's with real encoder
outputs, the talker's with real thinker states, the DiT's at every solver step, the vocoder's with mels. Quantized
graphs then get the same calls. So every step of a decoder is compared on the same past (teacher forcing), and the error
of a graph does not include that of the graphs before it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.export.evaluation.conversations import require_writer, session_conversations, short_reply
from omniport.export.evaluation.metrics import logit_figures
from omniport.export.evaluation.recording import RecordedGraph, RecordingBackend
from omniport.runtime.backends.base import Backend, BackendWrapper, Graph, KvCache, Outputs, RunHandle
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import CheckFailed
from omniport.runtime.events import Done
from omniport.runtime.session import OmniSession
from omniport.runtime.system.files import scratch_folder
from omniport.runtime.system.progress import Progress

Array = NDArray[Any]
#: built-in conversations: short, one for each way into the thinker
_NAMES = ("text", "turns", "audio", "image")
#: the signal-to-noise ratio, in dB, that means equal
EQUAL_DB = 300.0


@dataclass
class Calls:
    """Calls of one graph in order: its inputs, and the output that is compared, [rows, width] each."""

    feeds: list[dict[str, Array]] = field(default_factory=list)
    wanted: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """What `record` kept: names of the conversations, calls by graph, codes of a spoken reply."""

    conversations: tuple[str, ...]
    calls: Mapping[str, Calls]
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Replayed:
    """A graph's results on recorded calls.

    Attributes:
        outputs: as `Calls.wanted`.
        prefill: seconds of the longest call of a decoder; 0 for other graphs.
        step: seconds of a decoder's fastest call of one token; of other graphs' fastest call.
    """

    outputs: list[NDArray[np.float32]]
    prefill: float
    step: float


@dataclass(frozen=True)
class Loss:
    """How far outputs are from those of the unquantized graph.

    Attributes:
        sqnr_db: energy of the unquantized outputs over energy of the difference, over all calls.
        kl: of decoders: mean Kullback-Leibler divergence of the choice of the next token, in nats; else None.
        agreement: of decoders: share of steps whose most likely token is the same; else None.
    """

    sqnr_db: float
    kl: float | None = None
    agreement: float | None = None


def record(
    bundle: Bundle,
    *,
    data: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 16,
    max_codes: int = 32,
    sound: bool = True,
    progress: Progress | None = None,
) -> Recording:
    """Let a bundle answer conversations, and record the inputs and outputs of its graphs.

    Args:
        bundle: not quantized.
        data: JSON lines with ``messages``; built-in conversations without.
        max_new_tokens, max_codes: of a reply at most.
        sound: False: the replies' sound is not computed, and DiT and vocoder get no calls.
        progress: called with the conversation, and the number done and in total.

    Returns:
        calls by graph, of those graphs that had any, and the codes of the first reply that was spoken.

    Raises:
        UsageError: the bundle cannot answer, or ``data`` is not usable (names the line).
    """
    require_writer(bundle)
    recording = RecordingBackend(OrtBackend(bundle))
    backend: Backend = recording if sound else _SilentBackend(recording, bundle.manifest)
    with scratch_folder() as folder, OmniSession(bundle, backend) as session:
        conversations = session_conversations(session, data, folder, _NAMES)
        codes: list[list[int]] = []
        for number, conversation in enumerate(conversations):
            if progress is not None:
                progress(f"recording {conversation.name}", number, len(conversations))
            events = short_reply(session, conversation, max_new_tokens, max_codes, threads=False)
            codes.append([code for event in events if isinstance(event, Done) for code in event.codec_ids])
        calls = {name: _calls(name, graph) for name, graph in recording.graphs.items() if graph.calls}
        spoken = next((tuple(ids) for ids in codes if ids), ())
        return Recording(tuple(c.name for c in conversations), calls, spoken)


def replay(graph: Graph, name: str, calls: Calls, rounds: int = 1) -> Replayed:
    """Give a graph recorded calls.

    Args:
        name: of the graph.
        rounds: how often, for times that are not those of a first call; outputs are of the first round.
    """
    decoder, output = PARTS[name].decodes, PARTS[name].output
    capacity = max((len(feeds["kv_positions"]) for feeds in calls.feeds), default=0) if decoder else 0
    cache = graph.new_cache(capacity) if decoder else None
    outputs, times = [], []
    for number in range(rounds):
        for feeds in calls.feeds:
            begun = time.perf_counter()
            made = graph.run(feeds, cache)[output]
            times.append((time.perf_counter() - begun, _rows(feeds) if decoder else 1))
            if number == 0:
                outputs.append(made.reshape(-1, made.shape[-1]))
    longest = max((rows for _, rows in times), default=1)
    return Replayed(
        outputs,
        prefill=min((seconds for seconds, rows in times if rows == longest), default=0.0) if decoder else 0.0,
        step=min((seconds for seconds, rows in times if rows == 1), default=0.0),
    )


def loss_of(name: str, outputs: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]) -> Loss:
    """Compare outputs with those of the unquantized graph.

    Raises:
        CheckFailed: these have no energy, or the outputs are not finite.
    """
    signal = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in wanted)
    pairs = zip(outputs, wanted, strict=True)
    noise = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in pairs)
    if signal == 0:
        raise CheckFailed(f"the outputs of the unquantized {name} are silent, so that no loss can be measured")
    if not np.isfinite(noise):
        raise CheckFailed(f"the quantized {name} gives values that are not finite. Quantize with another recipe")
    sqnr = EQUAL_DB if noise == 0 else min(EQUAL_DB, 10 * float(np.log10(signal / noise)))
    if not PARTS[name].decodes:
        return Loss(sqnr)
    figures = logit_figures(np.concatenate(outputs), np.concatenate(wanted))
    return Loss(sqnr, float(figures["kl"] or 0), float(figures["top1_agreement"] or 0))


def _rows(feeds: Mapping[str, Array]) -> int:
    return int(feeds["inputs_embeds"].shape[1])


def _calls(name: str, graph: RecordedGraph) -> Calls:
    wanted = [given[PARTS[name].output] for given in graph.given]
    return Calls(list(graph.calls), [array.reshape(-1, array.shape[-1]) for array in wanted])


class _SilentBackend(BackendWrapper):
    """A backend whose DiT and vocoder give silence at once: nothing that comes before hears them."""

    def __init__(self, inner: Backend, manifest: Manifest) -> None:
        super().__init__(inner)
        self._hop = manifest.vocoder.hop if manifest.vocoder is not None else 1

    def graph(self, name: str) -> Graph:
        part = PARTS[name]
        return _SilentGraph(self._hop) if part.speaks and not part.decodes else super().graph(name)


class _SilentGraph(Graph):
    def __init__(self, hop: int) -> None:
        self._hop = hop

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        if "x" in feeds:
            kept = {name: array for name, array in feeds.items() if name.startswith("past_")}
            return {
                "velocity": np.zeros_like(feeds["x"]),
                **{n.replace("past", "present", 1): a for n, a in kept.items()},
            }
        return {"wav": np.zeros((1, feeds["mel"].shape[2] * self._hop), np.float32)}
