"""Check every graph alone against its transformers module, at several shapes, on random and real inputs.

References come first, all of them, and are then released: the largest reference part and the graphs are never in memory
at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Backend, Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError, BundleError, OmniportError
from omniport.runtime.media.image import image_input, video_input
from omniport.runtime.system.files import cache_folder

from ...evaluation.cases import Case, audio_case, bigvgan_case, decoder_cases, dit_case, vision_case
from ...evaluation.half_emulation import EmulatedBackend
from ...evaluation.metrics import MAX_SATURATED, MIN_ENERGY, Figures, compare, logit_figures
from ...evaluation.signals import (
    generator,
    log_mel_like,
    picture,
    prompt_inputs,
    random_positions,
    random_tokens,
    voice,
)
from ...models.voices import load_speakers
from ..context import Context
from ..reference import array_key
from ..tolerances import limit
from ..types import FAIL, NOT_RUN, PASS, Check
from .decode_reference import decoder_references

Array = NDArray[np.float32]

#: largest shapes that are checked, by dimension of the spec. The reference's attention is dense, its vocoder takes ten
#: seconds for one of sound: minutes of sound and pictures of 12 megapixels, which specs allow, are out of its reach
_LARGEST = {"chunks": 15, "units": 1024, "new_tokens": 512, "codes": 300, "frames": 480}


def graph_checks(context: Context) -> Iterator[Check]:
    """One check for every output of every case of every graph; stages are the graphs' names."""
    return case_checks(context, {name: graph_cases(context, name) for name in context.graphs})


def case_checks(context: Context, cases: Mapping[str, Sequence[Case]]) -> Iterator[Check]:
    """One check for each of the cases, given by graph."""
    wanted: dict[tuple[str, str], Array] = {}
    for graph, listed in cases.items():
        for case in listed:
            context.progress(f"{graph}: reference, {case.name}")
            wanted[graph, case.name] = _reference(context, case)
        if PARTS[graph].decodes and cache_folder() is not None:
            decoder_references(context, graph)  # for the decode checks, which follow, while the part is loaded
    context.reference.release()
    for graph, listed in cases.items():
        computes = context.bundle.manifest.graphs[graph].compute_dtype
        if computes == "float16" and context.backend.name == "ort-cpu":
            yield _rounded(context, listed[-1], wanted[graph, listed[-1].name])
        context.progress(f"{graph}: loading")
        loaded = load_graph(context.backend, graph)
        if isinstance(loaded, Check):
            yield loaded
            continue
        for case in listed:
            context.progress(f"{graph}: {case.name}")
            yield _check(context, case, loaded, wanted[graph, case.name])


def _rounded(context: Context, case: Case, wanted: Array) -> Check:
    """FP16 as a GPU computes it: on the CPU, ONNX Runtime leaves out roundings, and with them overflows."""
    case = dataclasses.replace(case, name=f"{case.name}, rounded to FP16 after every operation")
    context.progress(f"{case.graph}: {case.name}")
    backend = EmulatedBackend(context.bundle, (case.graph,), context.threads)
    try:
        loaded = load_graph(backend, case.graph)
        return loaded if isinstance(loaded, Check) else _check(context, case, loaded, wanted)
    finally:
        backend.close()


def _reference(context: Context, case: Case) -> Array:
    key = f"{case.name} {array_key(*case.inputs)}"
    return context.reference.result(case.graph, key, lambda module: {"out": case.reference(module)})["out"]


def load_graph(backend: Backend, name: str) -> Graph | Check:
    """The backend's graph, or the check that says why there is none: not run, or failed if the bundle is at fault."""
    try:
        return backend.graph(name)
    except BackendError as error:
        return Check(stage=name, name="load", status=NOT_RUN, message=str(error))
    except BundleError as error:
        return Check(stage=name, name="load", status=FAIL, message=str(error))


def _check(context: Context, case: Case, graph: Graph, wanted: Array) -> Check:
    try:
        got = case.ours(graph)
    except OmniportError as error:  # loaded, but refuses an input that its spec allows: broken, not absent
        return Check(stage=case.graph, name=case.name, status=FAIL, message=f"the graph did not run: {error}")
    logits = PARTS[case.graph].decodes and "hidden" not in case.name
    return array_check(case.graph, case.name, got, wanted, context.precision[case.graph], logits=logits)


def array_check(
    stage: str,
    name: str,
    got: Array,
    wanted: Array,
    precision: str,
    *,
    rule: str = "graph.rel_rms",
    logits: bool = False,
) -> Check:
    """Compare an array with its reference.

    Passes if the reference is finite, varies, has energy and is not saturated, and ours is finite and within the
    limits of ``rule`` and, for logits [N, V], of ``logits.kl``.
    """
    if got.shape != wanted.shape:
        message = f"shape {got.shape}; the reference has {wanted.shape}"
        return Check(stage=stage, name=name, status=FAIL, message=message)
    if not np.isfinite(wanted).all():
        return Check(stage=stage, name=name, status=FAIL, message="the reference is not finite, so it proves nothing")
    figures = compare(got, wanted)
    limits = {"rel_rms": limit(rule, precision)}
    if logits:
        figures |= logit_figures(got, wanted) if figures["finite"] else {"kl": float("inf")}
        limits["kl"] = limit("logits.kl", precision)
    problems = _problems(figures)
    for figure, bound in limits.items():
        value = figures[figure]
        if not (isinstance(value, float) and value <= bound.value):
            problems.append(f"{figure} is {value:.3g}, at most {bound.value:g} is allowed")
    if problems:
        problems.append(_where(got, wanted))
    return Check(
        stage=stage,
        name=name,
        status=FAIL if problems else PASS,
        figures=figures,
        limits={figure: bound.value for figure, bound in limits.items()},
        reasons={figure: bound.reason for figure, bound in limits.items()},
        message="; ".join(problems),
    )


def _problems(figures: Figures) -> list[str]:
    problems = []
    value = figures["energy"]
    if not (isinstance(value, float) and value > MIN_ENERGY):
        problems.append(
            f"the reference is silent (RMS {value:.1e}; above {MIN_ENERGY:g} is needed), so it proves nothing"
        )
    elif not figures["varies"]:
        problems.append("the reference is constant, so it proves nothing")
    elif float(figures["saturation"] or 0) > MAX_SATURATED:
        problems.append(f"{figures['saturation']:.0%} of the reference is at its largest value, so it proves nothing")
    if not figures["finite"]:
        problems.append("the output holds values that are not finite")
    return problems


def _where(got: Array, wanted: Array) -> str:
    """The first value that is not finite, else the one that is furthest off."""
    bad = ~np.isfinite(got)
    flat = int(bad.argmax()) if bad.any() else int(np.abs(got - wanted).argmax())
    at = tuple(int(i) for i in np.unravel_index(flat, got.shape))
    what = "first at" if bad.any() else "furthest off at"
    return f"{what} {list(at)}: {got[at]:.6g}, the reference has {wanted[at]:.6g}"


def graph_cases(context: Context, graph: str) -> list[Case]:
    """The cases of a graph, random and real: smallest, typical and odd shapes of its spec.

    In the full suite the largest too, or that of `_LARGEST` where the spec allows more. The last case is not large.
    """
    makers = {
        "audio_encoder": _audio,
        "vision_encoder": _vision,
        "thinker": _decoder,
        "talker": _decoder,
        "dit": _dit,
        "bigvgan": _bigvgan,
    }
    return list(makers[graph](context, graph))


def _largest(context: Context, graph: str, dim: str) -> tuple[int, ...]:
    """The largest value of a dimension, for the full suite only."""
    allowed = context.bundle.manifest.graphs[graph].dims[dim].max
    return (min(allowed, _LARGEST[dim]),) if context.full else ()


def _audio(context: Context, graph: str) -> Iterator[Case]:
    manifest = context.bundle.manifest
    for seconds in (0.31, 2.0, *((13.37,) if context.full else ())):
        noise = 0.1 * generator(f"noise {seconds}").standard_normal(int(16000 * seconds))
        yield audio_case(f"{seconds:g} s of noise", noise.astype(np.float32), manifest)
    chunk = manifest.audio.chunk_frames * manifest.audio.hop_length / manifest.audio.sampling_rate
    largest = [chunk * count for count in _largest(context, graph, "chunks")]
    for seconds in (*largest, 0.05, chunk, 5.03):
        yield audio_case(f"{seconds:g} s of voice", voice(seconds), manifest)


def _vision(context: Context, graph: str) -> Iterator[Case]:
    frontend, rng = context.bundle.manifest.vision, generator("pixels")
    unit, typical = frontend.patch_size * frontend.merge_size, context.bundle.manifest.graphs[graph].dims["units"].opt
    for height, width in ((unit, unit), (210, 87)):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield vision_case(f"{height}x{width} noise", image_input(noise, frontend))
    sizes = [(112, 112), (252, 336), (61, 230)]
    if context.full:
        squares = [unit * math.isqrt(count) for count in (typical, *_largest(context, graph, "units"))]
        sizes += [(620, 413), (56, 1008), *((side, side) for side in squares)]
    for height, width in sizes:
        yield vision_case(f"{height}x{width} picture", image_input(picture(height, width), frontend))
    for count in (4, *((10,) if context.full else ())):
        clip = np.stack([picture(96, 132, i / count) for i in range(count)])
        yield vision_case(f"video of {count} frames", video_input(clip, frontend))


def _decoder(context: Context, graph: str) -> Iterator[Case]:
    spec = context.bundle.manifest.graphs[graph]
    capacity, dims = context.max_context, spec.dims
    lengths = {dims["new_tokens"].min, dims["new_tokens"].opt, 17, 130, *_largest(context, graph, "new_tokens")}
    lengths |= {31, 257} if context.full else set()
    for length in sorted(n for n in lengths if n <= min(capacity, dims["new_tokens"].max)):
        rng = generator(f"{graph} {length}")
        rows, positions = random_tokens(context.checkpoint, graph, length, rng), random_positions(length, rng)
        yield from decoder_cases(graph, f"{length} tokens", rows[None], positions[:, None], capacity)
    rows, positions = prompt_inputs(context, graph)
    yield from decoder_cases(graph, "multimodal prompt", rows[None], positions[:, None], capacity)


def _dit(context: Context, graph: str) -> Iterator[Case]:
    manifest = context.bundle.manifest
    assert manifest.dit is not None
    assert manifest.solver is not None
    speakers = load_speakers(context.checkpoint.path / "spk_dict.pt")
    names, last = sorted(speakers), len(manifest.solver.table) - 1
    dim = manifest.graphs[graph].dims["codes"]
    plan = [(dim.min, 0), (12, last // 3), (13, last // 2), (dim.opt, last - 1), (61, last)]
    plan += [(36, step) for step in range(last + 1)] * context.full
    plan += [(length, last // 4) for length in _largest(context, graph, "codes")]
    for i, (length, step) in enumerate(plan):
        rng, name = generator(f"codes {length} {step}"), names[i % len(names)]
        codes = rng.integers(0, manifest.dit.num_embeds, (1, length))
        x = rng.standard_normal((1, length * manifest.dit.repeats, manifest.dit.mel_dim), np.float32)
        label = f"{length} codes, {name}, step {step}"
        yield dit_case(f"{label}, noise", x, codes, step, name, context.bundle, speakers[name])
    # half way between noise and a mel, with codes that are held as speech holds them
    length, step, name = 30, last // 2, names[-1]
    rng = generator("codes, real")
    codes = np.repeat(rng.integers(0, manifest.dit.num_embeds, (1, length // 3)), 3, axis=1)
    mel = log_mel_like(length * manifest.dit.repeats)[:, : manifest.dit.mel_dim].transpose(0, 2, 1)
    time = manifest.solver.table[step]
    x = ((1 - time) * rng.standard_normal(mel.shape) + time * mel).astype(np.float32)
    yield dit_case(f"{length} codes, {name}, step {step}, mel", x, codes, step, name, context.bundle, speakers[name])


def _bigvgan(context: Context, graph: str) -> Iterator[Case]:
    frames = context.bundle.manifest.graphs[graph].dims["frames"]
    rng = generator("mel")
    for length in (frames.min, 7):
        yield bigvgan_case(f"{length} frames, noise", rng.normal(-5, 2, (1, 80, length)).astype(np.float32))
    for length in (*_largest(context, graph, "frames"), *((frames.opt, 301) if context.full else ()), 37, 60):
        yield bigvgan_case(f"{length} frames, speech-like", log_mel_like(length))
