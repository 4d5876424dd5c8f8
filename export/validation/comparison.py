"""Build a check from a comparison: figures, the limits of its precision, and the faults found."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends.base import Backend, Graph
from omniport.runtime.errors import BackendError, BundleError

from ..evaluation.metrics import MAX_SATURATED, MIN_ENERGY, Figures, compare, energy, logit_figures, saturation
from ..evaluation.speech_metrics import sound_figures
from .tolerances import Limit, limit
from .types import FAIL, PASS, Check

Array = NDArray[np.float32]


class Comparison:
    """One check in the making: it fails if a fault is found.

    Args:
        stage, name: of the check; the stage may become another one while the fault is traced.
        precision: dtype whose row of the table of limits counts.
    """

    def __init__(self, stage: str, name: str, precision: str = "float32") -> None:
        self.stage, self.name, self.precision = stage, name, precision
        self.figures: Figures = {}
        self.faults: list[str] = []
        self._limits: dict[str, Limit] = {}

    def fault(self, message: str) -> None:
        """Make the check fail, and say why."""
        self.faults.append(message)

    def bound(self, figure: str, allowed: Limit) -> Limit:
        """Name the limit of a figure that is judged elsewhere."""
        self._limits[figure] = allowed
        return allowed

    def hold(self, figure: str, rule: str) -> None:
        """Compare a figure with its row of the table."""
        allowed, value = self.bound(figure, limit(rule, self.precision)), self.figures[figure]
        assert isinstance(value, (int, float))
        # not <=, so that NaN fails
        if not (value >= allowed.value if allowed.at_least else value <= allowed.value):
            bound = "least {:g} is needed" if allowed.at_least else "most {:g} is allowed"
            self.fault(f"{figure} is {value:.3g}, at {bound.format(allowed.value)}")

    def require_signal(self, array: NDArray[Any], what: str = "the reference") -> None:
        """Make the check fail if an array is silent, constant or clipped."""
        level, share = energy(array), saturation(array)
        if not level > MIN_ENERGY:
            self.fault(f"{what} is silent (RMS {level:.1e}; above {MIN_ENERGY:g} is needed), so it proves nothing")
        elif not float(array.std()) > 1e-6:
            self.fault(f"{what} is constant, so it proves nothing")
        elif share > MAX_SATURATED:
            self.fault(f"{share:.0%} of {what} is at its largest value, so it proves nothing")

    def compare_waves(self, got: Array, wanted: Array, group: str) -> None:
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

    def check(self, artifacts: dict[str, str] | None = None) -> Check:
        """The check."""
        return Check(
            stage=self.stage,
            name=self.name,
            status=FAIL if self.faults else PASS,
            figures=self.figures,
            limits={figure: allowed.value for figure, allowed in self._limits.items()},
            reasons={figure: allowed.reason for figure, allowed in self._limits.items()},
            message="; ".join(self.faults),
            artifacts=artifacts or {},
        )


def array_check(
    stage: str,
    name: str,
    got: Array,
    wanted: Array,
    precision: str = "float32",
    *,
    rule: str = "graph.rel_rms",
    logits: bool = False,
) -> Check:
    """Compare an array with its reference.

    Passes if the reference is finite, varies, has energy and is not saturated, and ours is finite and within the
    limits of ``rule`` and, for logits [N, V], of ``logits.kl`` (``unrounded.kl`` for rules of that kind). Tokens that a
    trained model never says may have one row of its head in common: of logits that are alike, one is compared, else
    they would hide an error in the others.
    """
    found = Comparison(stage, name, precision)
    if got.shape != wanted.shape:
        found.fault(f"shape {got.shape}; the reference has {wanted.shape}")
    elif not np.isfinite(wanted).all():
        found.fault("the reference is not finite, so it proves nothing")
    else:
        found.figures = compare(got, wanted)
        finite = bool(found.figures["finite"])
        own = _distinct_columns(wanted) if logits else slice(None)
        found.require_signal(wanted[..., own])
        if logits and finite:
            whole = float(found.figures["rel_rms"] or 0)
            found.figures = compare(got[..., own], wanted[..., own])
            found.figures["rel_rms"] = max(whole, float(found.figures["rel_rms"] or 0))
        if not finite:
            found.fault("the output holds values that are not finite")
        # 4 bits, and E4M3's 4 that count, move the logits of tokens that are never said as far as they are large: how
        # likely each is says more
        if not (logits and rule == "graph.rel_rms" and precision in ("int4", "fp8")):
            found.hold("rel_rms", rule)
        if logits:
            found.figures |= logit_figures(got, wanted) if finite else {"kl": float("inf")}
            found.hold("kl", "unrounded.kl" if rule == "unrounded.rel_rms" else "logits.kl")
        if found.faults:
            found.fault(_where(got, wanted))
    return found.check()


def _distinct_columns(array: Array) -> NDArray[np.int64]:
    """The first of each set of equal columns of [N, V]."""
    indices: NDArray[np.int64] = np.unique(array, axis=1, return_index=True)[1]
    return np.sort(indices)


def load_graph(backend: Backend, name: str) -> Graph | Check:
    """The backend's graph, or the check that says why there is none: not run, or failed if the bundle is at fault."""
    try:
        return backend.graph(name)
    except BackendError as error:
        return Check.not_run(name, "load", str(error))
    except BundleError as error:
        return Check.failed(name, "load", str(error))


def _where(got: Array, wanted: Array) -> str:
    """The first value that is not finite, else the one that is furthest off."""
    bad = ~np.isfinite(got)
    flat = int(bad.argmax()) if bad.any() else int(np.abs(got - wanted).argmax())
    at = tuple(int(i) for i in np.unravel_index(flat, got.shape))
    what = "first at" if bad.any() else "furthest off at"
    return f"{what} {list(at)}: {got[at]:.6g}, the reference has {wanted[at]:.6g}"


def equal_check(stage: str, name: str, got: NDArray[np.int64], wanted: NDArray[np.int64]) -> Check:
    """Whole numbers that must be equal. The reference must hold more than one value."""
    found = Comparison(stage, name)
    found.bound("different", Limit(0, "whole numbers: nothing is rounded"))
    same_shape = got.shape == wanted.shape
    different = int((got != wanted).sum()) if same_shape else max(got.size, wanted.size)
    found.figures = {"different": different, "count": int(wanted.size)}
    if not same_shape:
        found.fault(f"shape {got.shape}; the reference has {wanted.shape}")
    elif different:
        at = np.unravel_index(int((got != wanted).argmax()), got.shape)
        where = [int(i) for i in at]
        found.fault(
            f"{different} of {got.size} differ, the first at {where}: {got[at]}, the reference has {wanted[at]}"
        )
    elif len(np.unique(wanted)) < 2:
        found.fault("the reference is constant, so it proves nothing")
    return found.check()
