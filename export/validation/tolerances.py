"""The table of all validation limits, each with its reason.

No limit can be met by a silent reference: its energy is checked before any `Limit` is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """Largest value of a figure that still passes (smallest, where ``at_least``), and why."""

    value: float
    reason: str
    at_least: bool = False


_ORDER = "the same float32 arithmetic in another order of summation"
_HALF = "every activation is rounded to 11 bits once per operation"
_BRAIN = "every activation is rounded to 8 bits once per operation"
_WEIGHTS = (
    "8 or 4 bits: above what was measured on trained weights (12 M parameters, which lose more than large models do); "
    "this bound catches broken graphs, the quantization report states the loss"
)

_DECODE = "a graph against itself: only the order of summation depends on how tokens are fed"
_REPEAT = "the same coarse weights on both sides: only activations at a rounding step may fall on its other side"
_REPEAT_FP8 = _REPEAT + "; measured 0.14, for steps of E4M3 are 6 to 12% of a value"
_SPEECH = "measured on random weights with tenfold room or more: real ones are deeper and couple frames more strongly"
_PHASE = "coarse weights move the phase of the sound, so samples may differ: the mel distances judge"
_WINDOWS = (
    "a window's look-ahead is solved before its own look-ahead is known; measured 4e-3 (waveform) and 8e-5 (mel) on "
    "random weights, and 0.16 and 2e-2 without context; real weights couple blocks more strongly"
)
_SEAMS = (
    "frames of the look-ahead are solved again with more codes to come, and sound otherwise; measured on trained "
    "weights, beyond what the calmer chunk has elsewhere, 0.31 (step, in INT8; 0.085 in FP32), 0.34 (error, in FP8; "
    "0.30 in INT8, 0.09 in FP32) and 0.29 (mel, in FP8; 0.19 in INT8), and steps of 0.8 to 2.0 without going over"
)
_CONSTANTS = "the graph's own constants are rounded once; measured 1e-3 (vocoder in float16), 1e-6 elsewhere on Wren"
_STORED = (
    "rounding alone, once smoothing is undone: measured 0.017 in INT8, 0.026 in FP8 and 0.105 in INT4; another layer's "
    "weight, or a transposed one, is off by 0.98"
)
_CONTEXT = "windows with context must come far closer to the whole than windows solved alone; measured over 100 times"
_BORDER = "a sample or a 20 ms frame at the very threshold may fall on its other side"

_HOST = "host code in float32 or better on both sides: only the order of summation differs"
_ROWS = "the reference's own results pass through: one addition of two rows is all that is computed"
_FLOW = "the same float32 operations in the same order; only fused multiplications may round otherwise"
_CHOICE = (
    "nats: a choice may differ only where the reference itself is this close to undecided; measured on trained weights "
    "none in float16, 0.076 in bfloat16, 0.19 in INT8, 0.75 in FP8 and 2.5 in INT4"
)
_EQUAL = "float32 replies must be equal"


def _graded(
    figure: str, values: tuple[float, float, float, float, float], reason: str, coarse: str = "", at_least: bool = False
) -> dict[tuple[str, str], Limit]:
    """Rows of one figure for float32, float16, bfloat16, int8 and int4; ``coarse``: the reason for the last two.

    fp8 is held to the limit of int8, whose bits it has.
    """
    precisions = ("float32", "float16", "bfloat16", "int8", "int4", "fp8")
    reasons = (reason,) * 3 + (coarse or reason,) * 3
    return {
        (figure, precision): Limit(value, why, at_least)
        for precision, value, why in zip(precisions, (*values, values[3]), reasons, strict=True)
    }


#: (what, dtype of the weights) -> limit. ``what`` is a figure of a group of checks.
LIMITS: Mapping[tuple[str, str], Limit] = {
    ("graph.rel_rms", "float32"): Limit(1e-4, _ORDER),
    ("graph.rel_rms", "float16"): Limit(2e-2, _HALF),
    ("graph.rel_rms", "bfloat16"): Limit(8e-2, _BRAIN),
    ("graph.rel_rms", "int8"): Limit(0.35, _WEIGHTS),
    ("graph.rel_rms", "fp8"): Limit(0.35, _WEIGHTS),
    ("graph.rel_rms", "int4"): Limit(0.5, _WEIGHTS),
    ("logits.kl", "float32"): Limit(1e-6, _ORDER),
    ("logits.kl", "float16"): Limit(1e-2, _HALF),
    ("logits.kl", "bfloat16"): Limit(0.1, _BRAIN),
    ("logits.kl", "int8"): Limit(0.5, _WEIGHTS),
    ("logits.kl", "fp8"): Limit(1.0, _WEIGHTS),
    ("logits.kl", "int4"): Limit(2.0, _WEIGHTS),
    **_graded("decode.rel_rms", (1e-4, 1e-2, 5e-2, 0.1, 0.1), _DECODE, _REPEAT),
    ("decode.rel_rms", "fp8"): Limit(0.2, _REPEAT_FP8),
    ("layer.rel_rms", "float32"): Limit(1e-4, _ORDER),
    ("layer.rel_rms", "float16"): Limit(2e-2, _HALF),
    ("layer.rel_rms", "bfloat16"): Limit(8e-2, _BRAIN),
    ("layer.rel_rms", "int8"): Limit(0.35, _WEIGHTS),
    ("layer.rel_rms", "fp8"): Limit(0.35, _WEIGHTS),
    ("layer.rel_rms", "int4"): Limit(0.5, _WEIGHTS),
    ("unrounded.rel_rms", "float32"): Limit(1e-4, _ORDER),
    ("unrounded.rel_rms", "float16"): Limit(5e-3, _CONSTANTS),
    ("unrounded.rel_rms", "bfloat16"): Limit(5e-3, _CONSTANTS),
    ("unrounded.kl", "float32"): Limit(1e-6, _ORDER),
    ("unrounded.kl", "float16"): Limit(1e-4, _CONSTANTS),
    ("unrounded.kl", "bfloat16"): Limit(1e-4, _CONSTANTS),
    ("weights.rel_rms", "float16"): Limit(2e-3, _STORED),
    ("weights.rel_rms", "bfloat16"): Limit(1e-2, _STORED),
    ("weights.rel_rms", "int8"): Limit(0.05, _STORED),
    ("weights.rel_rms", "fp8"): Limit(0.08, _STORED),
    ("weights.rel_rms", "int4"): Limit(0.25, _STORED),
    ("preprocess.rel_rms", "float32"): Limit(1e-5, _HOST),
    ("conditioning.rel_rms", "float32"): Limit(1e-6, _ROWS),
    ("solver.rel_rms", "float32"): Limit(1e-5, _FLOW),
    **_graded("choice.gap", (0.0, 0.05, 0.25, 0.6, 5.0), _CHOICE),
    ("choice.gap", "float32"): Limit(0.0, _EQUAL),
    ("choice.gap", "fp8"): Limit(2.0, _CHOICE),
    **_graded("speech.mel.rel_rms", (5e-4, 3e-2, 0.15, 0.5, 0.7), _SPEECH, _WEIGHTS),
    **_graded("speech.wave.rel_rms", (1e-3, 5e-2, 0.25, 1.0, 1.5), _SPEECH, _PHASE),
    **_graded("speech.wave.mel_l1", (1e-3, 5e-2, 0.2, 0.3, 0.7), _SPEECH, _WEIGHTS),
    **_graded("speech.wave.mcd_db", (1e-2, 0.2, 0.8, 1.5, 4.0), _SPEECH, _WEIGHTS),
    **_graded("speech.wave.loudness_error_db", (0.01, 0.2, 0.5, 1.0, 3.0), _SPEECH, _WEIGHTS),
    **_graded("speech.wave.clipped_excess", (5e-3, 5e-3, 5e-3, 1e-2, 1e-2), _BORDER),
    **_graded("speech.wave.silent_excess", (0.02, 0.1, 0.1, 0.2, 0.2), _BORDER),
    **_graded("speech.streamed.rel_rms", (0.1, 0.1, 0.35, 0.35, 0.35), _WINDOWS),
    **_graded("speech.streamed.mel_rel_rms", (5e-3, 1e-2, 0.1, 0.1, 0.1), _WINDOWS),
    **_graded("speech.streamed.mel_l1", (0.05, 0.05, 0.2, 0.2, 0.2), _WINDOWS),
    **_graded("speech.streamed.mcd_db", (0.2, 0.2, 0.8, 0.8, 0.8), _WINDOWS),
    **_graded("speech.streamed.loudness_error_db", (0.1, 0.1, 0.3, 0.3, 0.3), _WINDOWS),
    **_graded("speech.streamed.clipped_excess", (5e-3, 5e-3, 5e-3, 1e-2, 1e-2), _BORDER),
    **_graded("speech.streamed.silent_excess", (0.1, 0.1, 0.1, 0.2, 0.2), _BORDER),
    **_graded("speech.streamed.seam_jump", (0.5, 0.5, 0.5, 0.5, 0.5), _SEAMS),
    **_graded("speech.streamed.seam_error", (0.25, 0.25, 0.5, 0.5, 0.5), _SEAMS),
    **_graded("speech.streamed.seam_mel_l1", (0.25, 0.25, 0.5, 0.5, 0.5), _SEAMS),
    **_graded("speech.streamed.context_gain", (5.0, 3.0, 1.5, 1.5, 1.5), _CONTEXT, at_least=True),
}


def limit(figure: str, precision: str) -> Limit:
    """The limit of a figure for a precision. KeyError names what has none."""
    return LIMITS[figure, precision]
