"""Metrics of sound: distance of a waveform from its reference, and whether it can be speech at all.

All waveforms are float32 [n] in -1..1. Mel spectra are computed from the waveforms and share no code with the model's
mel, so an error in the mel of either side shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.media.log_mel import mel_filters

Wave = NDArray[np.floating[Any]]
Spectrum = NDArray[np.float64]

#: what a logarithm gives for digital silence
FLOOR_DB = -200.0

_RATE, _N_FFT, _HOP, _MELS = 24000, 1024, 240, 80
#: mel-band power under which nothing counts: some 80 dB below a full-scale tone, which gives about 6e-3
_MEL_FLOOR = 1e-10
_CEPSTRA = 13
_CLIPPED = 0.999
_SILENT_DBFS, _SILENCE_FRAME = -60.0, 0.02
#: correlation above which a chunk is the same sound as another piece
_SAME = 0.9


def loudness_dbfs(wave: Wave) -> float:
    """Root mean square in dB relative to full scale (a full-scale square wave has 0).

    This is not LUFS: ITU-R BS.1770 weights by frequency and gates blocks of 400 ms, and a reply can be 20 ms long.
    """
    power = float(np.mean(np.square(wave, dtype=np.float64))) if wave.size else 0.0
    return max(FLOOR_DB, 10 * float(np.log10(power))) if power > 0 else FLOOR_DB


def snr_db(got: Wave, wanted: Wave) -> float:
    """Power of ``wanted`` over the power of the difference, in dB; at most 300, which means equal.

    Raises:
        ValueError: the lengths differ.
    """
    if got.shape != wanted.shape:
        raise ValueError(f"{got.size} samples, the reference has {wanted.size}")
    signal = float(np.sum(np.square(wanted, dtype=np.float64)))
    noise = float(np.sum(np.square(got.astype(np.float64) - wanted)))
    if noise == 0:
        return 300.0
    return float(np.clip(10 * np.log10(signal / noise), -300, 300)) if signal > 0 else -300.0


def clipped_share(wave: Wave) -> float:
    """Share of samples with an absolute value of at least 0.999."""
    return float(np.mean(np.abs(wave) >= _CLIPPED)) if wave.size else 0.0


def silent_share(wave: Wave, sample_rate: int = _RATE) -> float:
    """Share of 20 ms frames (the last may be shorter) whose RMS is under -60 dBFS; 1 for no samples."""
    size = round(sample_rate * _SILENCE_FRAME)
    frames = [wave[start : start + size] for start in range(0, wave.size, size)]
    return float(np.mean([loudness_dbfs(frame) < _SILENT_DBFS for frame in frames])) if frames else 1.0


def power_frames(wave: Wave, start: int = 0, stop: int | None = None) -> Spectrum:
    """Power spectra [frames, 513] of 43 ms Hann windows around every 10 ms from sample ``start`` to ``stop``.

    The signal counts as zero outside. A full-scale sine has a peak of 0.25 (-6 dB), whatever the window.
    """
    stop = wave.size if stop is None else stop
    padded = np.pad(np.asarray(wave, np.float64), _N_FFT // 2)
    centres = np.arange(start, max(stop, start + 1), _HOP)
    window = np.hanning(_N_FFT + 1)[:-1]
    frames = np.stack([padded[at : at + _N_FFT] for at in centres]) * (window / window.sum())
    power: Spectrum = np.abs(np.fft.rfft(frames, axis=-1)) ** 2
    return power


def log_mel_power(wave: Wave, start: int = 0, stop: int | None = None, sample_rate: int = _RATE) -> Spectrum:
    """Natural logarithm of mel power [frames, 80], floored at 1e-10."""
    bands = power_frames(wave, start, stop) @ _filters(sample_rate)
    result: Spectrum = np.log(np.maximum(bands, _MEL_FLOOR))
    return result


def mel_l1(got: Spectrum, wanted: Spectrum) -> float:
    """Mean absolute difference of two log-mel spectra of one shape, in nepers of power (1 is 4.3 dB)."""
    return float(np.mean(np.abs(got - wanted)))


def mel_cepstral_distortion(got: Spectrum, wanted: Spectrum) -> float:
    """Mean over frames of ``10 / ln 10 * sqrt(2 * sum of d_k^2)`` in dB, d_k the difference of mel cepstra 1 to 13.

    Kubichek, "Mel-cepstral distance measure for objective speech quality assessment" (1993). Coefficient 0, the level,
    is left out; frames are compared one to one, without time warping: both sides say the same codes. Cepstra are the
    type-II DCT of log-mel power over the number of bands, so that the result is the RMS distance of smoothed spectra.
    """
    bands = got.shape[-1]
    angles = np.pi * np.outer(np.arange(bands) + 0.5, np.arange(1, _CEPSTRA + 1)) / bands
    cepstra = (got - wanted) @ np.cos(angles) / bands  # [frames, 13]
    return float(np.mean(10 / np.log(10) * np.sqrt(2 * np.sum(cepstra**2, axis=-1))))


def spectral_flatness(wave: Wave) -> float:
    """Geometric over arithmetic mean of the power spectrum, mean over frames: near 0 a tone, 0.5 to 0.6 white noise.

    0 for digital silence.
    """
    power = power_frames(wave)[:, 1:]
    power = power[power.sum(-1) > 0]
    if not len(power):
        return 0.0
    mean = power.mean(-1)
    return float(np.mean(np.exp(np.mean(np.log(np.maximum(power, mean[:, None] * 1e-12)), -1)) / mean))


def tone_share(wave: Wave) -> float:
    """Share of the mean power spectrum, without DC, that lies within two bins of its strongest: near 1 for one tone."""
    power = power_frames(wave).mean(0)[2:]
    peak = int(power.argmax())
    total = float(power.sum())
    return float(power[max(0, peak - 2) : peak + 3].sum() / total) if total > 0 else 0.0


def synthetic_kind(wave: Wave, reference: Wave) -> str | None:
    """What a waveform is instead of speech, where the reference is not that too; None if nothing of the kind.

    ``silent`` (no 20 ms above -60 dBFS), ``constant`` (all but one part in 10^4 of its power is DC), ``a pure tone``
    (95% of the power in one spectral line) or ``white noise`` (a flat spectrum in every frame).
    """

    def kinds(x: Wave, slack: float) -> Iterable[str]:
        if silent_share(x) == 1:
            yield "silent"
        power = float(np.mean(np.square(x, dtype=np.float64)))
        if power > 0 and float(np.var(x, dtype=np.float64)) < 1e-4 * power:
            yield "constant"
        if tone_share(x) > 0.95 - slack:
            yield "a pure tone"
        if spectral_flatness(x) > 0.45 - slack:
            yield "white noise"

    if not wave.size:
        return "silent"
    excused = set(kinds(reference, slack=0.03))  # a reference close to a threshold is no proof either
    return next((kind for kind in kinds(wave, slack=0) if kind not in excused), None)


def sound_figures(wave: Wave, reference: Wave, sample_rate: int = _RATE) -> dict[str, float | int | bool | str | None]:
    """Everything that compares two waveforms of one length, n at least 1.

    Returns:
        snr_db, mel_l1, mcd_db, loudness_dbfs and loudness_error_db (absolute), seconds, clipped_excess and
        silent_excess (shares beyond the reference's), flatness, reference_flatness, synthetic.

    Raises:
        ValueError: the lengths differ.
    """
    wave = np.where(np.isfinite(wave), wave, 0)
    got, wanted = log_mel_power(wave, sample_rate=sample_rate), log_mel_power(reference, sample_rate=sample_rate)
    loudness = loudness_dbfs(wave)
    return {
        "seconds": wave.size / sample_rate,
        "snr_db": snr_db(wave, reference),
        "mel_l1": mel_l1(got, wanted),
        "mcd_db": mel_cepstral_distortion(got, wanted),
        "loudness_dbfs": loudness,
        "loudness_error_db": abs(loudness - loudness_dbfs(reference)),
        "clipped_excess": max(0.0, clipped_share(wave) - clipped_share(reference)),
        "silent_excess": max(0.0, silent_share(wave, sample_rate) - silent_share(reference, sample_rate)),
        "flatness": spectral_flatness(wave),
        "reference_flatness": spectral_flatness(reference),
        "synthetic": synthetic_kind(wave, reference),
    }


def seam_figures(streamed: Wave, whole: Wave, seams: Iterable[int]) -> dict[str, float | int | bool | str | None]:
    """Discontinuity where chunks meet, at the worst of the seams.

    Args:
        streamed, whole: the same speech in chunks and at once.
        seams: index of the first sample of every chunk but the first.

    Returns:
        seams: how many. seam_jump: step from the last sample of a chunk to the first of the next, beyond the step that
        the whole has there, over the RMS step of the whole within 10 ms. seam_error: RMS difference from the whole
        within 10 ms, over the RMS of the whole there. Both beyond what 19 of 20 places have in the chunk beside it that
        is nearer to the whole: coarse activations round otherwise everywhere, and most of all where it is quiet.
        seam_mel_l1: log-mel L1 of the windows that hold the seam. All 0 without seams.

    Raises:
        ValueError: the lengths differ.
    """
    if streamed.shape != whole.shape:
        raise ValueError(f"{streamed.size} samples, the whole has {whole.size}")
    a, b = streamed.astype(np.float64), whole.astype(np.float64)
    found = list(seams)
    if not found:
        return {"seams": 0, "seam_jump": 0.0, "seam_error": 0.0, "seam_mel_l1": 0.0}
    level = float(np.sqrt(np.mean(b**2))) + 1e-12
    bounds = [0, *found, len(b)]
    usual = [_usual(a, b, range(start + 2 * _HOP, end - 2 * _HOP, _HOP), level) for start, end in pairwise(bounds)]
    jump, error, mel = 0.0, 0.0, 0.0
    for at, before, behind in zip(found, usual, usual[1:], strict=False):
        beyond = np.subtract(_step_and_error(a, b, at, level), np.minimum(before, behind))
        jump, error = max(jump, float(beyond[0])), max(error, float(beyond[1]))
        around = max(0, at - _N_FFT // 4), at + _N_FFT // 4
        mel = max(mel, mel_l1(log_mel_power(a, *around), log_mel_power(b, *around)))
    return {"seams": len(found), "seam_jump": jump, "seam_error": error, "seam_mel_l1": mel}


def _usual(a: NDArray[np.float64], b: NDArray[np.float64], places: range, level: float) -> NDArray[np.float64]:
    """What 19 of 20 places of a chunk do not exceed, as `_step_and_error`; 0 where a chunk is too short to tell."""
    found = [_step_and_error(a, b, at, level) for at in places]
    return np.quantile(found, 0.95, axis=0) if found else np.zeros(2)


def _step_and_error(a: NDArray[np.float64], b: NDArray[np.float64], at: int, level: float) -> tuple[float, float]:
    """Difference of the steps to sample ``at``, and RMS difference within 10 ms, over those of ``b`` there."""
    near = slice(max(0, at - _HOP), at + _HOP)
    # A hundredth of the whole's own level: a seam in a pause is not measured against nothing.
    step = max(float(np.sqrt(np.mean(np.diff(b[near]) ** 2))), 0.01 * level)
    local = max(float(np.sqrt(np.mean(b[near] ** 2))), 0.01 * level)
    jump = abs((a[at] - a[at - 1]) - (b[at] - b[at - 1])) / step
    return float(jump), float(np.sqrt(np.mean((a[near] - b[near]) ** 2))) / local


def _filters(sample_rate: int) -> NDArray[np.float64]:
    """[513, 80]"""
    return mel_filters(_MELS, _N_FFT, sample_rate).T


def misplaced_chunks(chunks: Sequence[Wave], whole: Wave) -> list[str]:
    """For chunks that differ from the whole at their place: where in the whole their sound is, if it is anywhere.

    Returns:
        one sentence for each chunk that holds sound of another place, in order.
    """
    found: list[str] = []
    start = 0
    for index, chunk in enumerate(chunks):
        own = whole[start : start + len(chunk)]
        if len(own) < len(chunk) or _correlation(chunk, own) < _SAME:
            place, match = _best_place(chunk, whole)
            if match >= _SAME and place != start:
                found.append(
                    f"chunk {index} (samples {start} to {start + len(chunk)}) holds the sound of samples {place} to "
                    f"{place + len(chunk)}"
                )
        start += len(chunk)
    return found


def _correlation(a: Wave, b: Wave) -> float:
    scale = float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64)))
    return float(a.astype(np.float64) @ b / scale) if scale > 0 else 0.0


def _best_place(chunk: Wave, whole: Wave) -> tuple[int, float]:
    """Where in ``whole`` a chunk fits best, and its correlation there."""
    if len(chunk) > len(whole) or not len(chunk):
        return 0, 0.0
    size = 1 << (len(whole) + len(chunk) - 1).bit_length()
    spectrum = np.fft.rfft(whole.astype(np.float64), size) * np.conj(np.fft.rfft(chunk.astype(np.float64), size))
    products = np.fft.irfft(spectrum, size)[: len(whole) - len(chunk) + 1]
    sums = np.concatenate([[0.0], np.cumsum(whole.astype(np.float64) ** 2)])
    power = np.maximum(sums[len(chunk) :] - sums[: len(sums) - len(chunk)], 1e-12)
    scores = products / np.sqrt(power)
    best = int(scores.argmax())
    return best, _correlation(chunk, whole[best : best + len(chunk)])
