"""Metrics that compare an array with its reference: errors, SQNR, cosine, KL, agreement."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: below this root mean square a reference proves nothing
MIN_ENERGY = 1e-3
#: above this share of values at its largest magnitude a reference proves nothing: it is clipped
MAX_SATURATED = 0.5

Figures = dict[str, float | int | bool | str | None]


def figure_text(value: float | int | bool | str | None) -> str:
    """A figure with the digits that mean something: three of them for a float."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int | str) else f"{value:.3g}"


def energy(array: NDArray[Any]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0


def saturation(array: NDArray[Any]) -> float:
    """Share of values whose magnitude is the largest: near 0 for a signal, near 1 for one that is clipped."""
    magnitude = np.abs(array)
    return float(np.mean(magnitude == magnitude.max())) if array.size else 0.0


def compare(got: NDArray[Any], wanted: NDArray[Any]) -> Figures:
    """max_abs, rel_rms, cosine, sqnr_db, finite; of the reference: energy, varies (is not constant), saturation.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != wanted.shape:
        raise ValueError(f"shape {got.shape}, the reference has {wanted.shape}")
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    finite = bool(np.isfinite(a).all())
    difference = np.where(np.isfinite(a), a, 0) - b
    norm = float(np.linalg.norm(b))
    error = float(np.linalg.norm(difference))
    scale = float(np.linalg.norm(np.where(np.isfinite(a), a, 0))) * norm
    return {
        "max_abs": float(np.abs(difference).max()) if finite and a.size else float("inf"),
        "rel_rms": error / norm if finite and norm > 0 else float("inf"),
        "cosine": float(np.where(np.isfinite(a), a, 0) @ b / scale) if scale > 0 else 0.0,
        "sqnr_db": min(300.0, 20 * float(np.log10(norm / error)))
        if error > 0 and norm > 0 and finite
        else 300.0 * finite,
        "finite": finite,
        "energy": energy(b),
        "varies": bool(b.size > 1 and float(b.std()) > 1e-6),
        "saturation": saturation(wanted),
    }


def logit_figures(got: NDArray[Any], wanted: NDArray[Any]) -> Figures:
    """For logits [N, V]: top-1 agreement, mean KL(reference || ours) in nats, worst rank of the reference's top."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    p, q = _log_softmax(b), _log_softmax(a)
    top = b.argmax(-1)
    chosen = np.take_along_axis(a, top[:, None], -1)
    return {
        "top1_agreement": float(np.mean(a.argmax(-1) == top)),
        "kl": float(np.mean(np.sum(np.exp(p) * (p - q), -1))),
        "worst_rank": int((a > chosen).sum(-1).max()),
    }


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max(-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result
