"""Scales from NVIDIA Model Optimizer: SmoothQuant's factors, and AWQ's search for INT4 in blocks.

Products of one tensor (q, k and v; gate and up) have to share their factors, so they are shown to it as one product
with all of their outputs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = ["AWQ_BLOCKS", "awq_factors", "smooth_factors"]

Factors = NDArray[np.float32]

#: sizes of INT4 blocks that a search is made for
AWQ_BLOCKS = (32, 128)
#: how much of the inputs' unevenness goes to the weights: half and half (SmoothQuant, section 4)
_ALPHA = 0.5


def smooth_factors(absmax: Factors, weight_absmax: Factors) -> Factors:
    """SmoothQuant's factors [K]: the input is divided by them, rows of the weight multiplied.

    They depend on two maxima alone, so a product with one output, whose weights are those maxima, stands in for the
    real one, and one input row for all.

    Args:
        absmax: float32 [K], largest magnitude of each input channel. weight_absmax: of each row of the weight.
    """
    mtq = _modelopt()
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    config["algorithm"] = {"method": "smoothquant", "alpha": _ALPHA}
    # a weight row of nothing but zeros would be divided by
    rows = np.maximum(weight_absmax, np.float32(1e-5) * max(float(weight_absmax.max()), 1e-5))
    return _factors(mtq, config, torch.from_numpy(rows[None]), torch.from_numpy(absmax[None]))


def awq_factors(rows: torch.Tensor, weight: torch.Tensor, block: int) -> Factors:
    """AWQ's factors [K] for INT4 in blocks: those of eleven candidates with the least error of the product.

    Args:
        rows: float32 [n, K], inputs. weight: float32 [N, K].
        block: values along K that share a scale; K is a multiple of it.
    """
    mtq = _modelopt()
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"] = {-1: block, "type": "static"}
    return _factors(mtq, config, weight, rows)


def _factors(mtq: Any, config: Mapping[str, Any], weight: torch.Tensor, rows: torch.Tensor) -> Factors:
    product = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    product.weight = nn.Parameter(weight.clone(), requires_grad=False)  # it is changed in place
    model = nn.Sequential(product)
    with torch.no_grad(), _quiet():
        mtq.quantize(model, config, lambda model: model(rows))
    quantizer: Any = product.input_quantizer
    inverse: Factors = quantizer.pre_quant_scale.reshape(-1).float().numpy()  # what the input is multiplied by
    return _clean(np.float32(1) / inverse)


def _clean(factors: Factors) -> Factors:
    """Positive and finite, with a geometric mean of 1: a factor common to all channels changes nothing."""
    good = np.isfinite(factors) & (factors > 0)
    logs = np.log(np.where(good, factors, 1.0).astype(np.float64))
    return np.exp(np.where(good, logs - logs[good].mean() if good.any() else 0.0, 0.0)).astype(np.float32)


def _modelopt() -> Any:
    with _quiet():
        import modelopt.torch.quantization as mtq
    return mtq


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Model Optimizer prints, and its warnings about versions and about layers that were not used."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
