"""Search the fewest modules of a decoder to keep unquantized so that its loss meets a goal.

A part is a module that holds products (`part_of`). Each part's damage is measured alone, everything else unquantized;
parts are then kept in the order of their damage. How many of them is found by measuring: damages do not add up, so a
sum is never taken for a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from omniport.runtime.errors import UsageError
from omniport.runtime.system.progress import Progress

from .report.recorded_calls import Loss

#: measures a decoder with these parts kept and all others quantized
Measure = Callable[[frozenset[str]], Loss]


@dataclass(frozen=True)
class Goal:
    """What may be lost: the least SQNR in dB, or the largest KL divergence in nats. One of them is given."""

    sqnr_db: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.sqnr_db, self.kl) if value is not None]
        if len(given) != 1:
            raise UsageError("give one target: --target-sqnr in dB or --max-kl in nats")
        if self.kl is not None and not self.kl > 0:
            raise UsageError(f"--max-kl {self.kl}: more than 0 was expected")

    def met(self, loss: Loss) -> bool:
        """Whether a loss is within the goal."""
        if self.sqnr_db is not None:
            return loss.sqnr_db >= self.sqnr_db
        assert self.kl is not None
        assert loss.kl is not None
        return loss.kl <= self.kl

    def damage(self, loss: Loss) -> float:
        """What parts are ordered by: noise over signal, or KL divergence."""
        return float(10 ** (-loss.sqnr_db / 10)) if self.sqnr_db is not None else float(loss.kl or 0)

    def __str__(self) -> str:
        return f"SQNR of at least {self.sqnr_db:g} dB" if self.sqnr_db is not None else f"KL of at most {self.kl:g}"


@dataclass(frozen=True)
class Damage:
    """A part quantized alone."""

    part: str
    loss: Loss


@dataclass(frozen=True)
class Point:
    """A point of the trade-off curve: the ``kept`` most damaging parts unquantized, all others quantized."""

    kept: int
    loss: Loss


@dataclass(frozen=True)
class SearchResult:
    """What was found for a decoder.

    Attributes:
        damages: the most damaging first.
        curve: every number of kept parts that was measured, in order.
        kept: the parts to keep.
    """

    damages: tuple[Damage, ...]
    curve: tuple[Point, ...]
    kept: tuple[str, ...]


def part_of(weight: str) -> str:
    """The module that a weight's layer lies in (``model.layers.0.mlp``); the layer itself if it lies in none."""
    layer = weight.removesuffix(".weight")
    module = layer.rpartition(".")[0]
    return module if any(char.isdigit() for char in module) else layer


def parts_of(weights: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Part -> its weights, in order."""
    parts: dict[str, list[str]] = {}
    for weight in weights:
        parts.setdefault(part_of(weight), []).append(weight)
    return {part: tuple(names) for part, names in parts.items()}


def search(parts: Sequence[str], measure: Measure, goal: Goal, progress: Progress | None = None) -> SearchResult:
    """Find the fewest parts to keep.

    Every part is measured alone, then all of them with a quarter, a half and three quarters kept, and by halving where
    the goal begins to be met: some ``len(parts) + 3 + log2(len(parts))`` measurements. The number found meets the
    goal as measured; one fewer, taken in the same order, does not.

    Args:
        parts: that the recipe quantizes; at least one.
        progress: called with what is measured, and measurements done and in all.

    Raises:
        UsageError: the goal is not met even with one part quantized.
    """
    count = len(parts)
    steps = _Steps(count + 3 + count.bit_length(), progress)
    everything = frozenset(parts)
    damages = []
    for part in parts:
        steps.next(f"{part} alone")
        damages.append(Damage(part, measure(everything - {part})))
    # equal damages in the order of the graph: the same search every time
    damages.sort(key=lambda damage: -goal.damage(damage.loss))
    order = [damage.part for damage in damages]
    measured: dict[int, Loss] = {count - 1: damages[-1].loss}  # all but the least damaging kept

    def loss(kept: int) -> Loss:
        if kept not in measured:
            steps.next(f"{kept} of {count} parts kept")
            measured[kept] = measure(frozenset(order[:kept]))
        return measured[kept]

    if not goal.met(measured[count - 1]):
        raise UsageError(
            f"the recipe cannot meet it: with {order[-1]} alone quantized, which does the least damage, the loss is "
            f"{_text(measured[count - 1])}; {goal} was asked for. Ask for less, or leave the graph unquantized with "
            "--graph-recipe GRAPH=none"
        )
    low, high = -1, count - 1  # too few, enough
    while high - low > 1:
        middle = 0 if low < 0 else (low + high) // 2
        low, high = (low, middle) if goal.met(loss(middle)) else (middle, high)
    for quarter in (1, 2, 3):
        loss(min(count - 1, count * quarter // 4))
    curve = tuple(Point(kept, measured[kept]) for kept in sorted(measured))
    return SearchResult(tuple(damages), curve, tuple(order[:high]))


def _text(loss: Loss) -> str:
    return f"{loss.sqnr_db:.1f} dB" + (f", KL {loss.kl:.3g}" if loss.kl is not None else "")


class _Steps:
    """Counts measurements."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def next(self, what: str) -> None:
        if self._progress is not None:
            self._progress(f"measuring {what}", min(self._done, self._total), self._total)
        self._done += 1
