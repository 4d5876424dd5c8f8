"""Calibrate all parts in order, each on what the part before it really produced.

Encoders and thinker go a layer at a time over all samples, and can be resumed after every layer. Talker, DiT and
vocoder are run by the runtime's own loops, a group of samples in lockstep, and can be resumed after every group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from omniport.runtime.backends.base import Array, Backend, KvCache, Outputs
from omniport.runtime.bundle.manifest import VoiceSpec
from omniport.runtime.bundle.parts import PARTS, Part, decoders, giving
from omniport.runtime.concurrency.timing import StageTimer
from omniport.runtime.errors import OmniportError
from omniport.runtime.generation.decoder import Decoder
from omniport.runtime.generation.encoders import audio_batches, valid_rows, vision_batches
from omniport.runtime.generation.talker import Talker
from omniport.runtime.prompt.builder import MediaSpan
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.system.progress import Progress

from .checkpoint_source import Source
from .dataset import Sample
from .findings import Findings
from .layer_runner import Call, LayerRunner
from .lockstep import LayerCaches, Lockstep, Request
from .sites import SitePlan, plan_sites
from .work_dir import Work

_HEAD = "lm_head.weight"
#: samples that speak side by side: their KV caches are in memory
_GROUP = 8


@dataclass(frozen=True)
class Job:
    """What is calibrated, on what, and where work lies.

    Attributes:
        max_codes: codec tokens of a sample's speech at most (50 a second).
        graphs: whose findings are wanted.
        progress: called with the stage, and what is done of how much.
    """

    source: Source
    samples: Sequence[Sample]
    work: Work
    seed: int
    max_codes: int
    progress: Progress
    graphs: Collection[str]


class Stages:
    """Runs the stages that are not finished yet, and gathers what they found."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plans: dict[str, tuple[SitePlan, ...]] = {}

    def run(self) -> None:
        """Run all that is left, up to the last part that is wanted: each is fed by those before it.

        Raises:
            CheckFailed: a value that is not finite; names the layer.
        """
        last = max((at for at, name in enumerate(PARTS) if name in self._job.graphs), default=-1)
        for name, part in list(PARTS.items())[: last + 1]:
            if name in self._job.source.definitions and not self._job.work.done(name):
                self._run(part)
                self._job.work.finish(name)

    def _run(self, part: Part) -> None:
        """Run one part's stage: what samples do not reach is left out."""
        speech = {"logits": self._codes, "velocity": self._mels, "wav": self._sounds}
        if part.media:
            self._encoder(part.name)
        elif part.speaks:
            self._speak(part.name, speech[part.output])
        elif part.decodes:
            self._thinker(part.name)

    def findings(self, graph: str) -> Findings:
        """What was found of a graph."""
        definition, ckpt = self._job.source.definitions[graph], self._job.source.ckpt
        module = definition.module()
        rules = dict(module.named_rules(str(module.prefix)))
        folder = self._job.work.folder / "sites" / graph
        return Findings(folder, self._sites(graph), rules, ckpt, PARTS[graph].decodes)

    def _sites(self, graph: str) -> tuple[SitePlan, ...]:
        if graph not in self._plans:
            self._job.progress(f"reading the graph of {graph}", 0, 1)
            self._plans[graph] = plan_sites(self._job.source.exported[graph])
        return self._plans[graph]

    def _runner(self, graph: str, **options: Any) -> LayerRunner:
        job = self._job
        definition, ckpt = job.source.definitions[graph], job.source.ckpt
        spool = job.work.folder / "spool" / graph
        return LayerRunner(definition, ckpt, self._sites(graph), spool, **options)

    def _layers(
        self, runner: LayerRunner, findings: Findings, calls: Callable[[], Iterator[Call]], empty: Call
    ) -> None:
        """Take all calls of a part through its layers, from where an earlier run has come to.

        Args:
            empty: stands for any call once its inputs have entered.
        """
        work, depth, name = self._job.work, runner.module.depth, runner.name
        if not work.done(f"{name}-enter"):
            runner.enter(calls())
            findings.take(runner.observers)
            work.put(f"{name}-calls", len(runner.caches))
            work.finish(f"{name}-enter")
        runner.caches = [list(empty.caches) for _ in range(work.get(f"{name}-calls"))]
        for index in range(depth):
            self._job.progress(name, index, depth)
            if work.done(f"{name}-{index}"):
                continue
            runner.run_layer(index, keep_caches=False)
            findings.take(runner.observers)
            work.finish(f"{name}-{index}")

    def _encoder(self, graph: str) -> None:
        kinds = PARTS[graph].media
        findings = self.findings(graph)
        runner = self._runner(graph, memory=0, again=False)
        places: list[tuple[int, int, list[int]]] = []

        def calls() -> Iterator[Call]:
            for number, place, feeds in self._media(kinds):
                places.append((number, place, [int(count) for count in feeds.get("frames", ())]))
                yield _call(self._job.source, graph, feeds)
            self._job.work.put(f"{graph}-places", places)

        self._layers(runner, findings, calls, Call(()))
        outputs = zip(self._job.work.get(f"{graph}-places"), runner.leave(), strict=True)
        for (number, place), calls_of_one in itertools.groupby(outputs, lambda found: found[0][:2]):
            pieces = [
                valid_rows(out.numpy(), frames) if frames else [out.numpy()] for (_, _, frames), out in calls_of_one
            ]
            rows = np.concatenate(list(itertools.chain.from_iterable(pieces)))
            self._job.work.put_array(f"media/{number}-{place}", rows)
        findings.take(runner.observers)
        runner.close()

    def _media(self, kinds: Sequence[str]) -> Iterator[tuple[int, int, Mapping[str, Array]]]:
        """(sample, place among its media, what the encoder is called with), in order."""
        for number, sample in enumerate(self._job.samples):
            for place, span in enumerate(self._spans(sample)):
                if span.kind in kinds:
                    for feeds in _batches(span):
                        yield number, place, feeds

    def _spans(self, sample: Sample) -> list[MediaSpan]:
        source = self._job.source
        return sample.prompt(source.manifest, source.codec).media

    def _thinker(self, graph: str) -> None:
        findings = self.findings(graph)
        runner = self._runner(graph, memory=0, again=False, unseen=(_HEAD,))
        calls = (self._teach(graph, number, sample) for number, sample in enumerate(self._job.samples))
        self._layers(runner, findings, lambda: calls, Call((), _no_caches(self._job.source, graph)))
        for number, (sample, hidden) in enumerate(zip(self._job.samples, runner.leave(), strict=True)):
            # The head is asked after the prompt and after each token of the reply.
            prompt = hidden.shape[1] - len(sample.reply)
            runner.observers[_HEAD].see(hidden[:, prompt - 1 :])
            rows = hidden[0].numpy() + self._job.work.array(f"talk/{number}-embeds")
            self._job.work.put_array(f"talk/{number}-rows", rows)
        findings.take(runner.observers)
        runner.close()

    def _teach(self, graph: str, number: int, sample: Sample) -> Call:
        """Prompt and reply of a sample, as one call of the thinker; what the talker needs of it is written down."""
        source, work = self._job.source, self._job.work
        prompt = sample.prompt(source.manifest, source.codec)
        table = source.bundle.embedding(graph)
        embeds = table.rows(np.concatenate([prompt.token_ids, np.asarray(sample.reply, np.int64)]))
        spoken = embeds.copy()
        spoken[: len(prompt.token_ids)][prompt.media_mask] = 0  # the talker hears the state alone there
        for place, span in enumerate(prompt.media):
            embeds[span.indices] = work.array(f"media/{number}-{place}")
        ahead = np.tile(prompt.next_position + np.arange(len(sample.reply)), (3, 1))
        positions = np.concatenate([prompt.position_ids, ahead], axis=1)
        work.put_array(f"talk/{number}-embeds", spoken)
        work.put_array(f"talk/{number}-positions", prompt.position_ids)
        work.put(f"talk/{number}", prompt.next_position)
        feeds = {
            "inputs_embeds": embeds[None],
            "position_ids": np.ascontiguousarray(positions[:, None]),
            "kv_positions": np.arange(len(embeds)),
            "write_index": np.zeros(1, np.int64),
        }
        return _call(source, graph, feeds, _no_caches(source, graph))

    def _codes(self, number: int, backend: Backend) -> None:
        """Sample the codec tokens of a sample's speech, as a reply's are."""
        source, work = self._job.source, self._job.work
        manifest, config = source.manifest, source.manifest.talker_sampling
        assert config is not None
        talker = Talker(source.bundle)
        config = msgspec.structs.replace(config, max_new_tokens=self._job.max_codes)
        graph = backend.graph(decoders()[1].name)
        decoder = Decoder(graph, graph.new_cache(manifest.kv.max_context))
        rows, positions = work.array(f"talk/{number}-rows"), work.array(f"talk/{number}-positions")
        count = positions.shape[1]
        decoder.forward(rows[:count], positions)
        sampler = talker.sampler(config, self._streams(number)[1])
        codes = talker.codes(
            decoder,
            iter(rows[count:]),
            self._voice(number),
            sampler,
            StageTimer(),
            tail=int(work.get(f"talk/{number}")),
            highest=int(positions.max()),
        )
        work.put(f"codes/{number}", list(codes))

    def _mels(self, number: int, backend: Backend) -> None:
        """Solve the mel windows of a sample's speech, as they go to the vocoder."""
        source, work = self._job.source, self._job.work
        dit = source.manifest.dit
        assert dit is not None
        voice = source.bundle.voice(self._voice(number).name)
        noise = NoiseStream(None, self._streams(number)[2], dit.mel_dim)
        token2wav = Token2Wav(backend, source.bundle, voice, noise)
        pieces = [piece for code in work.get(f"codes/{number}") for piece in token2wav.mels(code)]
        pieces += token2wav.last_mels()
        for i, piece in enumerate(pieces):
            work.put_array(f"mels/{number}-{i}", piece.mel)
        work.put(f"mels/{number}", len(pieces))

    def _sounds(self, number: int, backend: Backend) -> None:
        """Let the vocoder hear a sample's mel windows."""
        for i in range(self._job.work.get(f"mels/{number}")):
            mel = self._job.work.array(f"mels/{number}-{i}")
            backend.graph(giving("wav").name).run({"mel": np.ascontiguousarray(mel.T[None])})

    def _speak(self, graph: str, job: Callable[[int, Backend], None]) -> None:
        """Run a part for all samples that speak, a group in lockstep, from where an earlier run has come to."""
        work, numbers = self._job.work, self._speaking
        findings, runner = self.findings(graph), self._runner(graph)
        lockstep: Lockstep[None]
        for start in range(work.restore(graph, runner.observers), len(numbers), _GROUP):
            self._job.progress(graph, start, len(numbers))
            lockstep = Lockstep(partial(_execute, self._job.source, runner), self._new_cache)
            lockstep.run([partial(job, number) for number in numbers[start : start + _GROUP]])
            work.keep(graph, start + _GROUP, runner.observers)
        findings.take(runner.observers)
        runner.close()

    @property
    def _speaking(self) -> list[int]:
        return [number for number, sample in enumerate(self._job.samples) if sample.reply]

    def _new_cache(self, graph: str, capacity: int) -> KvCache:
        return LayerCaches(_no_caches(self._job.source, graph), capacity)

    def _voice(self, number: int) -> VoiceSpec:
        """The voice that a sample speaks with: any of them."""
        voices = self._job.source.manifest.voices
        return voices[int(self._job.samples[number].digest, 16) % len(voices)]

    def _streams(self, number: int) -> list[np.random.Generator]:
        """Sources of randomness of a sample: thinker, talker, noise, as in a reply."""
        entropy = [self._job.seed, int(self._job.samples[number].digest, 16)]
        return [np.random.default_rng(s) for s in np.random.SeedSequence(entropy).spawn(3)]


def _batches(span: MediaSpan) -> Iterator[Mapping[str, Array]]:
    if span.kind == "audio":
        assert span.chunks is not None
        assert span.frames is not None
        return audio_batches(span.chunks, span.frames)
    assert span.vision is not None
    return vision_batches(span.vision)


def _call(source: Source, graph: str, feeds: Mapping[str, Array], caches: Sequence[torch.Tensor] = ()) -> Call:
    """A call of a part with what the runtime would feed its graph."""
    definition = source.definitions[graph]
    inputs = definition.inputs[: len(definition.inputs) - definition.past]
    return Call(tuple(torch.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in inputs), list(caches))


def _no_caches(source: Source, graph: str) -> list[torch.Tensor]:
    geometry = source.manifest.decoders[graph]
    return [torch.zeros(1, geometry.num_kv_heads, 0, geometry.head_dim)] * (2 * geometry.num_layers)


def _execute(source: Source, runner: LayerRunner, graph: str, requests: Sequence[Request]) -> list[Outputs]:
    """Carry out calls that the runtime's loops wait for."""
    if graph != runner.name:
        raise OmniportError(f"{graph} was asked for while {runner.name} is calibrated")
    definition = source.definitions[graph]
    past = [spec.name for spec in definition.inputs[len(definition.inputs) - definition.past :]]
    calls = []
    for request in requests:
        if isinstance(request.cache, LayerCaches):
            caches = request.cache.tensors
        else:  # what a call is given of the one before, as arrays
            caches = [torch.from_numpy(request.feeds[name]) for name in past]
        call = _call(source, graph, request.feeds)
        calls.append(Call(call.inputs, caches))
    (name,) = (spec.name for spec in definition.outputs if not spec.name.startswith("present_"))
    present = [spec.name for spec in definition.outputs if spec.name != name]
    outputs = []
    for request, call, out in zip(requests, calls, runner.run(calls), strict=True):
        given = {} if request.cache is not None else dict(zip(present, call.caches, strict=True))
        outputs.append({key: tensor.numpy() for key, tensor in {name: out, **given}.items()})
    return outputs
