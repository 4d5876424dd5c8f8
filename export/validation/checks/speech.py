"""Check speech, whole and streamed, from codes to sound, against the reference and each other.

The cases end at and around the borders of the DiT's blocks. First the mel and waveform of the whole reply are compared
with transformers', part by part; then the streamed reply with the whole one, over the same noise. A failure is
attributed to the DiT's graph, the solver, the vocoder's graph, or (stage ``speech``) the runtime's code around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.parts import giving
from omniport.runtime.errors import BackendError, OmniportError
from omniport.runtime.speech.windows import SpeechWindows

from ...evaluation.metrics import compare, energy
from ...evaluation.speech_metrics import misplaced_chunks, seam_figures
from ..comparison import Comparison
from ..context import Context
from ..tolerances import limit
from ..types import FAIL, Check
from .asr import asr_checks, parse_command
from .solver import blame_mel, whole_feeds
from .speech_runs import (
    SpeechCase,
    SpeechRun,
    centred,
    mel_error,
    reference_mel,
    reference_wave,
    speak,
    speech_cases,
    streamed_mel,
    without_context,
)


def speech_checks(context: Context, asr: str | None = None) -> Iterator[Check]:
    """Whole replies against transformers, streamed replies against whole ones.

    Args:
        asr: command of a recogniser that a spoken reply is given to, see ``asr_checks``.

    Yields:
        for every length: ``dit`` (or ``solver``) the mel, ``bigvgan`` the waveform of the reference's mel, ``speech``
        the whole reply and the streamed reply. One check with status ``not_run`` where the bundle or backend does not
        speak.

    Raises:
        UsageError: ``asr`` is no command that can be run.
    """
    if asr is not None:
        parse_command(asr)  # a mistyped command shows before the long work
    if reason := _why_not(context):
        yield Check.not_run("speech", "spoken replies", reason)
        return
    cases = speech_cases(context)
    longest = max(cases, key=lambda case: len(case.codes))
    context.progress("speech: the reference's mel")
    for case in cases:
        case.mel = reference_mel(context, case)
    context.progress("speech: the reference's waveform")
    for case in cases:
        case.wave = reference_wave(context, case)
    context.reference.release()
    for case in cases:
        context.progress(f"speech: {case.name}")
        yield from _check_case(context, case, alone=case is longest)
    if asr is not None:
        yield from asr_checks(context, asr)


def _why_not(context: Context) -> str:
    """Why nothing can be spoken here; empty if it can."""
    manifest = context.bundle.manifest
    if manifest.dit is None or manifest.vocoder is None or manifest.solver is None or not manifest.voices:
        return "the bundle does not speak: it was exported from a checkpoint without talker"
    names = [part.name for part in (giving("velocity"), giving("wav"))]
    if missing := [name for name in names if name not in context.graphs]:
        return f"{', '.join(missing)}: not in the bundle, or left out by --graphs"
    try:
        for name in names:
            context.backend.graph(name)
    except BackendError as error:
        return str(error)
    return ""


# --- one case --------------------------------------------------------------------------------------------------------


def _check_case(context: Context, case: SpeechCase, alone: bool) -> Iterator[Check]:
    """Mel, vocoder, whole, streamed; a later check that fails after an earlier one takes that one's stage."""
    whole = speak(context, case, "whole")
    mel = _mel_check(context, case, whole)
    vocoder = _vocoder_check(context, case)
    stage = next((check.stage for check in (mel, vocoder) if check.status == FAIL), "speech")
    yield mel
    yield vocoder
    check = _whole_check(context, case, whole, stage)
    yield check
    yield _streamed_check(context, case, whole, stage if check.status == FAIL else "speech", alone)


def _mel_check(context: Context, case: SpeechCase, whole: SpeechRun) -> Check:
    """Our DiT and solver against the reference's: float32 [80, 2n]."""
    flow = giving("velocity").name
    found, wanted = Comparison(flow, f"mel of {case.name}", context.precision[flow]), case.mel
    got = whole.mels[0] if len(whole.mels) == 1 else None
    found.require_signal(wanted - wanted.mean(), "the reference's mel, less its mean,")
    if got is None:
        found.fault(whole.error or f"the vocoder was called {len(whole.mels)} times; once was expected")
    elif got.shape != wanted.shape:
        found.fault(f"the mel is {list(got.shape)}; {list(wanted.shape)} was expected")
    else:
        found.figures |= compare(*centred(got, wanted))
        found.hold("rel_rms", "speech.mel.rel_rms")
    if found.faults:
        found.stage = _blame(context, case)
    return found.check(_keep(context, case, {"reference_mel": wanted, "whole_mel": got}))


def _blame(context: Context, case: SpeechCase) -> str:
    """The stage that a wrong mel comes from."""
    feeds = whole_feeds(context.bundle, case.codes)
    solver = context.bundle.manifest.solver
    assert solver is not None  # _why_not
    bound = limit("speech.mel.rel_rms", context.precision[giving("velocity").name]).value
    allowed = bound * float(case.mel.std()) / energy(case.mel)
    return blame_mel(context.backend, solver, feeds, case.noise[None], case.mel.T[None], allowed)


def _vocoder_check(context: Context, case: SpeechCase) -> Check:
    """Our vocoder's graph against the reference's, both on the reference's mel."""
    vocoder = giving("wav")
    title = f"waveform of the reference's mel, {case.name}"
    found = Comparison(vocoder.name, title, context.precision[vocoder.name])
    found.require_signal(case.wave, "the reference's waveform")
    try:
        feeds = {"mel": np.ascontiguousarray(case.mel[None])}
        got = context.backend.graph(vocoder.name).run(feeds)[vocoder.output].reshape(-1)
    except OmniportError as error:
        found.fault(str(error))
    else:
        found.compare_waves(got, case.wave, "speech.wave")
    return found.check()


def _whole_check(context: Context, case: SpeechCase, whole: SpeechRun, stage: str) -> Check:
    """The whole reply against the reference's, samples counted."""
    precision = context.coarsest((giving("velocity"), giving("wav")))
    found = Comparison(whole.broken or stage, f"whole reply of {case.name}", precision)
    found.require_signal(case.wave, "the reference's waveform")
    got = _samples(found, whole, len(case.wave))
    if got is not None:
        found.compare_waves(got, case.wave, "speech.wave")
    named = {"reference": case.wave, "whole": got, "reference_mel": case.mel}
    named["whole_mel"] = whole.mels[0] if len(whole.mels) == 1 else None
    return found.check(_keep(context, case, named))


def _streamed_check(context: Context, case: SpeechCase, whole: SpeechRun, stage: str, alone: bool) -> Check:
    """The streamed reply against the whole one: every sample once and in order, and no audible seams.

    ``alone``: also against windows that are solved without context.
    """
    streamed, wanted = speak(context, case, SpeechWindows()), whole.wave
    precision = context.coarsest((giving("velocity"), giving("wav")))
    found = Comparison(streamed.broken or stage, f"streamed reply of {case.name}", precision)
    found.require_signal(case.wave, "the reference's waveform")
    found.require_signal(wanted, "the whole reply")
    got, mel = _samples(found, streamed, len(case.wave)), streamed_mel(context, streamed)
    if got is not None and got.shape == wanted.shape and not found.faults:
        found.compare_waves(got, wanted, "speech.streamed")
        ends = np.cumsum([len(chunk) for chunk in streamed.chunks])
        found.figures |= {"chunks": len(streamed.chunks), **seam_figures(got, wanted, ends[:-1].tolist())}
        for figure in ("seam_jump", "seam_error", "seam_mel_l1"):
            found.hold(figure, f"speech.streamed.{figure}")
        found.figures["mel_rel_rms"] = mel_error(mel, whole)
        found.hold("mel_rel_rms", "speech.streamed.mel_rel_rms")
        if alone and len(streamed.chunks) > 1 and not found.faults:
            blind = speak(context, case, SpeechWindows(), without_context(context))
            error = mel_error(streamed_mel(context, blind), whole)
            gain = error / max(float(found.figures["mel_rel_rms"] or 0), 1e-12)
            found.figures |= {"mel_rel_rms_without_context": error, "context_gain": min(gain, 1e6)}
            found.hold("context_gain", "speech.streamed.context_gain")
    if found.faults:
        found.faults += misplaced_chunks(streamed.chunks, wanted)
    whole_mel = whole.mels[0] if len(whole.mels) == 1 else None
    named = {"reference": case.wave, "whole": wanted, "streamed": got, "reference_mel": case.mel}
    named |= {"whole_mel": whole_mel, "streamed_mel": mel}
    return found.check(_keep(context, case, named))


def _samples(found: Comparison, run: SpeechRun, expected: int) -> NDArray[np.float32] | None:
    """The samples that came out, if they can be compared: none missing, none twice."""
    wave = run.wave
    found.figures |= {"samples": len(wave), "expected_samples": expected}
    if run.error:
        found.fault(run.error)
        return None
    if run.late:
        found.fault(f"{run.late} samples came out again after the end")
    if len(wave) != expected:
        kind = "missing" if len(wave) < expected else "too many"
        found.fault(f"{len(wave)} samples came out; {expected} were expected: {abs(len(wave) - expected)} {kind}")
    return wave


def _keep(context: Context, case: SpeechCase, arrays: Mapping[str, NDArray[Any] | None]) -> dict[str, str]:
    """Keep arrays for the report; gives role -> name. Mels end in ``.mel``, waveforms in ``.wav``."""
    if not case.kept:
        return {}
    names = {}
    for role, array in arrays.items():
        if array is not None:
            side, _, mel = role.partition("_")
            names[role] = f"speech/{len(case.codes)}/{side}.{mel or 'wav'}"
            context.artifacts[names[role]] = array
    return names
