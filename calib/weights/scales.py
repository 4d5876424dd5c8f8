"""Look up a calibration for a bundle's weights: smoothing factors, and scales of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.bundle.recipes import CHANNELS_LAST, Weight
from omniport.runtime.errors import UsageError

from ..calibration_file import Calibration, Site
from .choices import Choice
from .rounding import LARGEST
from .smoothing_pass import Factors

Array = NDArray[Any]
#: a scale is a divisor, and normal in half precision
_SMALLEST = 2.0**-14


def check_sites(calibration: Calibration | None, choices: Mapping[str, Sequence[Choice]]) -> None:
    """Refuse a calibration that says too little, or none where one is needed.

    Raises:
        UsageError: names the first weight that lacks something.
    """
    for graph, row in choices.items():
        for choice in row:
            if not choice.scheme.activations:
                continue
            what = f"scheme {choice.scheme.name} of {graph}/{choice.weight.name}"
            if calibration is None:
                raise UsageError(
                    f"{what} rounds what the weight multiplies, so that it needs a calibration: run omniport calibrate "
                    "on the checkpoint, and give what it writes with --calib"
                )
            site = calibration.site(graph, choice.weight.name)
            if site is None:
                raise UsageError(
                    f"{what} needs a range, and the calibration has none for that weight. Run omniport calibrate again "
                    f"with data that {graph} sees, or leave it out with --graph-recipe {graph}=none"
                )
            lacks = choice.scheme.factors and choice.scheme.factors not in site.arrays
            if lacks or len(site.arrays["absmax"]) % _inputs(choice.weight):
                raise UsageError(
                    f"{what}: the calibration has {', '.join(sorted(site.arrays))} of {len(site.arrays['absmax'])} "
                    f"channels; {choice.scheme.factors or 'absmax'} of {_inputs(choice.weight)} was expected. Run "
                    "omniport calibrate again"
                )
            if choice.scheme.outputs and calibration.site(graph, choice.weight.name, output=True) is None:
                raise UsageError(
                    f"{what} rounds what the convolution gives as well, and the calibration has no range of that: it "
                    "is of an older release. Run omniport calibrate again, or leave such weights as they are with "
                    f"--keep {graph}/{choice.weight.name.partition('.')[0]}"
                )


def smoothing(calibration: Calibration | None, graph: str, choices: Sequence[Choice]) -> dict[str, Array]:
    """Weight -> factors [K], for schemes that want some and weights that the calibration has some for."""
    found = {}
    for choice in choices:
        site = _site(calibration, graph, choice)
        factors = site.arrays.get(choice.scheme.factors) if site is not None and choice.scheme.factors else None
        if factors is not None and choice.weight.kind == "matmul" and len(factors) == _inputs(choice.weight):
            found[choice.weight.name] = factors.astype(np.float32)
    return found


def input_scales(
    calibration: Calibration | None, graph: str, choices: Sequence[Choice], factors: Mapping[str, Factors]
) -> dict[str, float]:
    """Weight -> scale of what it multiplies, for schemes that round it.

    Args:
        factors: what inputs were divided by, as `SmoothPass` left them. Ranges of divided inputs follow from the
            largest magnitude of each channel; others are those that the scheme's ``clip`` chose.
    """
    scales = {}
    for choice in choices:
        if not choice.scheme.activations:
            continue
        site = _site(calibration, graph, choice)
        assert site is not None
        rows = factors.get(choice.weight.name, Factors()).rows
        top = site.record.clips[choice.scheme.clip] if rows is None else float((site.arrays["absmax"] / rows).max())
        scales[choice.weight.name] = _scale(top, choice)
    return scales


def output_scales(calibration: Calibration | None, graph: str, choices: Sequence[Choice]) -> dict[str, float]:
    """Weight -> scale of what its convolution gives, for schemes that round it."""
    scales = {}
    for choice in choices:
        if choice.scheme.outputs:
            assert calibration is not None
            site = calibration.site(graph, choice.weight.name, output=True)
            assert site is not None
            scales[choice.weight.name] = _scale(site.record.clips[choice.scheme.clip], choice)
    return scales


def _scale(top: float, choice: Choice) -> float:
    return max(top / LARGEST[choice.scheme.format], _SMALLEST)


def _site(calibration: Calibration | None, graph: str, choice: Choice) -> Site | None:
    return None if calibration is None else calibration.site(graph, choice.weight.name)


def _inputs(weight: Weight) -> int:
    """Input channels of each group: rows of [K, N], the second dimension of [out, in, ...]."""
    return weight.shape[0] if weight.layout == CHANNELS_LAST else weight.shape[1]
