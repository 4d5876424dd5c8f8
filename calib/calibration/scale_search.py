"""Search scales with NVIDIA Model Optimizer: SmoothQuant factors, and AWQ factors for INT4 in blocks.

Products of one tensor (q, k and v; gate and up) have to share their factors, so they are shown to it as one product
with all of their outputs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Factors = NDArray[np.float32]

#: sizes of INT4 blocks that a search is made for
AWQ_BLOCKS = (32, 128)
#: how much of the inputs' unevenness goes to the weights (SmoothQuant, section 4): half, or more where that is better
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, eq=False)
class Product:
    """All products of one tensor, as one.

    Attributes:
        absmax: float32 [K], largest magnitude of each input channel. weight_absmax: of each row of the weights [K, N].
        rows: float32 [n, K], some of the inputs. weight: float32 [N', K], some of the outputs' weights.
    """

    absmax: Factors
    weight_absmax: Factors
    rows: torch.Tensor
    weight: torch.Tensor


def smooth_factors(products: Sequence[Product]) -> list[Factors]:
    """SmoothQuant's factors [K]: the input is divided by them, rows of the weight multiplied.

    Of `ALPHAS`, the one whose factors lose least of the product in INT8: weights with a scale per output, the input
    with one scale.
    """
    best = [_best_alpha(product) for product in products]
    found: dict[int, Factors] = {}
    for alpha in sorted(set(best)):
        places = [i for i, chosen in enumerate(best) if chosen == alpha]
        found |= zip(places, _smoothed([products[i] for i in places], alpha), strict=True)
    return [found[i] for i in range(len(products))]


def _smoothed(products: Sequence[Product], alpha: float) -> list[Factors]:
    """Factors of products by Model Optimizer.

    They come from two maxima alone, so a product with one output, whose weights are those maxima, stands in for the
    real one, and one input row for all.
    """
    mtq = _modelopt()
    config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    config["algorithm"] = {"method": "smoothquant", "alpha": alpha}
    layers = _quantized(mtq, config, [(_row(_above_zero(p)), _row(p.absmax)) for p in products])
    return [_factors(layer) for layer in layers]


def _best_alpha(product: Product) -> float:
    exact = product.rows @ product.weight.T
    return min(ALPHAS, key=lambda alpha: _loss(product, exact, alpha))


def _loss(product: Product, exact: torch.Tensor, alpha: float) -> float:
    """Squared error of the smoothed product in INT8, beside the exact one."""
    top = torch.from_numpy(np.maximum(product.absmax, np.float32(1e-30)))
    factors = top**alpha / torch.from_numpy(_above_zero(product)) ** (1 - alpha)
    step = (top / factors).max() / 127
    rows = torch.clamp(torch.round(product.rows / factors / step), -127, 127) * step
    weight = product.weight * factors
    steps = torch.clamp(weight.abs().amax(dim=1, keepdim=True) / 127, min=1e-30)
    lost = rows @ (torch.round(weight / steps) * steps).T - exact
    return float(lost.double().square().mean())


def _above_zero(product: Product) -> Factors:
    """Maxima of weight rows, with next to nothing in place of zeros, which would be divided by."""
    top = product.weight_absmax
    return np.maximum(top, np.float32(1e-5 * max(float(top.max()), 1e-5)))


def _row(values: Factors) -> torch.Tensor:
    return torch.from_numpy(values[None])


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
    return _factors(_quantized(mtq, config, [(weight, rows)])[0])


def _quantized(mtq: Any, config: Mapping[str, Any], products: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
    """Layers with (weight [N, K], input rows [n, K]) after Model Optimizer has quantized them."""
    model = nn.ModuleList(_product(weight) for weight, _ in products)

    def forward(model: nn.Module) -> None:
        for product, (_, rows) in zip(model.children(), products, strict=True):
            product(rows)

    with torch.no_grad(), _quiet():
        mtq.quantize(model, config, forward)
    return list(model)


def _factors(layer: Any) -> Factors:
    inverse: Factors = layer.input_quantizer.pre_quant_scale.reshape(-1).float().numpy()  # what the input is times
    return _clean(np.float32(1) / inverse)


def _product(weight: torch.Tensor) -> nn.Linear:
    product = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    product.weight = nn.Parameter(weight.clone(), requires_grad=False)  # it is changed in place
    return product


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
