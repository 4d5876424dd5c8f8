"""Compare the figures of a speech check with the limits of its precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...evaluation.metrics import MAX_SATURATED, MIN_ENERGY, compare, energy, saturation
from ...evaluation.speech_metrics import sound_figures
from ..tolerances import limit
from ..types import FAIL, PASS, Check
from .speech_runs import SpeechRun

Wave = NDArray[np.float32]
Figures = dict[str, float | int | bool | str | None]


class Verdict:
    """Figures of one check, held to their limits."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.figures: Figures = {}
        self.limits: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self.faults: list[str] = []

    def fault(self, message: str) -> None:
        """Make the check fail, and say why."""
        self.faults.append(message)

    def require_energy(self, array: NDArray[Any], what: str) -> None:
        """A comparison with silence, with something constant or clipped, proves nothing."""
        level = energy(array)
        if not np.isfinite(level) or level <= MIN_ENERGY or float(array.std()) <= 1e-6:
            self.fault(f"{what} has an RMS of {level:.2g} and proves nothing; more than {MIN_ENERGY:g} was expected")
        elif saturation(array) > MAX_SATURATED:
            self.fault(f"{saturation(array):.0%} of {what} is at its largest value, which proves nothing")

    def hold(self, figure: str, row: str) -> None:
        """Compare a figure with its row of the table."""
        allowed, value = limit(row, self.precision), self.figures[figure]
        assert isinstance(value, (int, float))
        self.limits[figure], self.reasons[figure] = allowed.value, allowed.reason
        # not <=, so that NaN fails
        if not (value >= allowed.value if allowed.at_least else value <= allowed.value):
            bound = "least" if allowed.at_least else "most"
            self.fault(f"{figure} is {value:.3g}; at {bound} {allowed.value:g} was expected")

    def take_samples(self, run: SpeechRun, expected: int) -> Wave | None:
        """The samples that came out, if they can be compared: none missing, none twice."""
        wave = run.wave
        self.figures |= {"samples": len(wave), "expected_samples": expected}
        if run.error:
            self.fault(run.error)
            return None
        if run.late:
            self.fault(f"{run.late} samples came out again after the end")
        if len(wave) != expected:
            kind = "missing" if len(wave) < expected else "too many"
            self.fault(f"{len(wave)} samples came out; {expected} were expected: {abs(len(wave) - expected)} {kind}")
        return wave

    def compare_waves(self, got: Wave, wanted: Wave, group: str) -> None:
        """Waveforms of one length, sample by sample and as sound. ``group``: ``speech.wave`` or ``speech.streamed``."""
        if got.shape != wanted.shape:
            self.fault(f"{len(got)} samples; {len(wanted)} were expected")
            return
        self.figures |= {**compare(got, wanted), **sound_figures(got, wanted)}
        if not self.figures["finite"]:
            self.fault("the waveform holds NaN or infinite samples")
        if kind := self.figures["synthetic"]:
            self.fault(f"the waveform is {kind}, and what it is compared with is not")
        for figure in ("rel_rms", "mel_l1", "mcd_db", "loudness_error_db", "clipped_excess", "silent_excess"):
            self.hold(figure, f"{group}.{figure}")

    def check(self, stage: str, name: str, artifacts: dict[str, str]) -> Check:
        """The check: failed if anything was found."""
        return Check(
            stage=stage,
            name=name,
            status=FAIL if self.faults else PASS,
            figures=self.figures,
            limits=self.limits,
            reasons=self.reasons,
            message="; ".join(self.faults),
            artifacts=artifacts,
        )
