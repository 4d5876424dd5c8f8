"""Turn observers into finished sites with their scales, kept in the work folder until all parts are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from omniport.export.models.module import Rule, Transpose, WeightReader
from omniport.runtime.system.files import replacing
from safetensors import safe_open
from safetensors.numpy import save_file

from ..calibration_file import Site, SiteRecord
from .layer_weights import read_rows
from .observers import Observer
from .scale_search import AWQ_BLOCKS, Product, awq_factors, smooth_factors
from .sites import SitePlan

_RECORD = "record"
#: outputs of a product that a search looks at: evenly spaced where there are more
_OUTPUTS = 2048
#: input channels of the products that are looked at together: about 250 MB of weights
_GROUP_CHANNELS = 32768
#: share of the magnitudes within the range that is called percentile
_PERCENTILE = 0.9999
#: magnitudes that INT8 can tell apart
_LEVELS = 128
#: bins between two ranges that are tried
_STEP = 16


class Findings:
    """The finished sites of one graph.

    Args:
        rules: where each weight comes from (`ExportModule.named_rules`).
        searches: whether INT4 is searched for.
    """

    def __init__(
        self, folder: Path, sites: Sequence[SitePlan], rules: Mapping[str, Rule], reader: WeightReader, searches: bool
    ) -> None:
        self._folder = folder
        self._sites = {site.name: (i, site) for i, site in enumerate(sites)}
        self._rules, self._reader, self._searches = rules, reader, searches
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, observers: dict[str, Observer]) -> None:
        """Finish every site that was seen, and take its observer away."""
        group: list[tuple[SitePlan, Observer]] = []
        for name in [name for name, observer in observers.items() if observer.count]:
            group.append((self._sites[name][1], observers.pop(name)))
            if sum(len(observer.absmax) for _, observer in group) > _GROUP_CHANNELS:
                self._finish(group)
                group = []
        self._finish(group)

    def load(self) -> Iterator[Site]:
        """The finished sites in the graph's order; those that were never seen are left out."""
        for index, _ in self._sites.values():
            path = self._path(index)
            if not path.exists():
                continue
            with safe_open(path, framework="numpy") as file:
                record = msgspec.json.decode(file.metadata()[_RECORD], type=SiteRecord)
                yield Site(record, {name: file.get_tensor(name) for name in sorted(file.keys())})

    def _finish(self, group: Sequence[tuple[SitePlan, Observer]]) -> None:
        """Choose scales for some sites at once: Model Optimizer takes longer to begin than for a small product."""
        products = {site.name: self._product(site, observer) for site, observer in group if site.smooths}
        smooth = dict(zip(products, smooth_factors(list(products.values())) if products else (), strict=True))
        for site, observer in group:
            arrays: dict[str, NDArray[Any]] = {"absmax": observer.absmax, "hist": observer.hist}
            if site.name in products:
                arrays |= {"smooth": smooth[site.name], **self._search(products[site.name])}
            record = SiteRecord(
                weights=tuple(weight.name for weight in site.weights),
                kind=site.kind,
                count=observer.count,
                clips=choose_clips(arrays["hist"], float(observer.absmax.max())),
                output=site.output,
            )
            self._store(Site(record, arrays))

    def _product(self, site: SitePlan, observer: Observer) -> Product:
        return Product(observer.absmax, self._weight_absmax(site), observer.rows, self._some_outputs(site))

    def _search(self, product: Product) -> dict[str, NDArray[Any]]:
        blocks = [block for block in AWQ_BLOCKS if len(product.absmax) % block == 0] if self._searches else []
        return {f"awq-{block}": awq_factors(product.rows, product.weight, block) for block in blocks}

    def _weight_absmax(self, site: SitePlan) -> NDArray[np.float32]:
        """float32 [K]: largest magnitude of each row of [K, N], over all weights of a site, read in blocks."""
        top = np.zeros(site.weights[0].shape[0], np.float32)
        for key in self._keys(site):
            for _, _, rows in read_rows(key, self._reader):  # [outputs, K]
                top = np.maximum(top, rows.reshape(len(rows), -1).abs().amax(dim=0).numpy())
        return top

    def _some_outputs(self, site: SitePlan) -> torch.Tensor:
        """float32 [n, K]: evenly spaced outputs of all weights of a site, at most about `_OUTPUTS`."""
        stride = -(-sum(weight.shape[1] for weight in site.weights) // _OUTPUTS)
        found = []
        for key in self._keys(site):
            for start, _, rows in read_rows(key, self._reader):
                found.append(rows.reshape(len(rows), -1)[-start % stride :: stride].clone())
        return torch.cat(found)

    def _keys(self, site: SitePlan) -> list[str]:
        rules = [self._rules[weight.name] for weight in site.weights]
        assert all(isinstance(rule, Transpose) for rule in rules), site.name
        return [rule.key for rule in rules if isinstance(rule, Transpose)]

    def _store(self, site: Site) -> None:
        with replacing(self._path(self._sites[site.name][0])) as partial:
            save_file(
                {name: np.ascontiguousarray(array) for name, array in site.arrays.items()},
                partial,
                {_RECORD: msgspec.json.encode(site.record, order="sorted").decode()},
            )

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:05d}.safetensors"


def choose_clips(hist: NDArray[np.int64], top: float) -> dict[str, float]:
    """The largest magnitude to keep, for each way to choose one (`omniport.calib.calibration_file.CLIPS`).

    Args:
        hist: counts of magnitudes in equal bins from 0 to ``top``.
    """
    if top <= 0 or not hist.any():
        return dict.fromkeys(("max", "percentile", "entropy", "mse"), top)
    width = top / len(hist)
    return {
        "max": top,
        "percentile": min(top, (_quantile(hist) + 1) * width),
        "entropy": min(top, _least_entropy(hist) * width),
        "mse": min(top, _least_error(hist) * width),
    }


def _quantile(hist: NDArray[np.int64]) -> int:
    """The first bin up to which `_PERCENTILE` of the values lie."""
    return int(np.searchsorted(np.cumsum(hist), _PERCENTILE * hist.sum()))


def _candidates(hist: NDArray[np.int64]) -> range:
    return range(_LEVELS, len(hist) + 1, _STEP)


def _least_error(hist: NDArray[np.int64]) -> int:
    """Bins to keep for the least squared error of 127 steps: rounding inside the range, clipping outside."""
    middle = np.arange(len(hist)) + 0.5
    errors = []
    for kept in _candidates(hist):
        step = kept / (_LEVELS - 1)
        rounded = np.minimum(np.rint(middle / step), _LEVELS - 1) * step
        errors.append(float((hist * (middle - rounded) ** 2).sum()))
    return _candidates(hist)[int(np.argmin(errors))]


def _least_entropy(hist: NDArray[np.int64]) -> int:
    """Bins to keep for the least Kullback-Leibler divergence from what the values were to what `_LEVELS` steps leave.

    After "8-bit inference with TensorRT" (GTC 2017): what is cut off is added to the last bin that is kept; a step's
    count is spread over those of its bins that hold anything. Bin 0, where zeros of activations pile up, is left out.
    """
    counts = hist.astype(np.float64)
    counts[0] = 0
    if not counts.any():
        return len(hist)
    losses = []
    for kept in _candidates(hist):
        inside = counts[:kept]
        reference = inside.copy()
        reference[-1] += counts[kept:].sum()
        losses.append(_divergence(reference, _spread(inside)))
    return _candidates(hist)[int(np.argmin(losses))]


def _spread(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts after each step's have become equal over its bins that hold anything."""
    step = np.arange(len(counts)) * _LEVELS // len(counts)
    held = counts > 0
    total = np.bincount(step, counts, _LEVELS)
    bins = np.bincount(step, held, _LEVELS)
    return np.where(held, (total / np.maximum(bins, 1))[step], 0.0)


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    if not q.any():
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    # a bin that q lacks (only the last can be one) counts as if it held next to nothing, not as infinity
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], 1e-9))).sum())
