"""A heat map of plans: targets by recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniport.runtime.errors import ExportError

from .plan import RecipePlan, TargetPlan

__all__ = ["draw_sweep"]

#: colours of: cannot be had, does not fit, cannot be built there, too slow for speech, real time, best
_STATES = ("#d9d9d9", "#b2484a", "#d08c60", "#e8d58a", "#8fbf8f", "#2e7d4f")
_WORDS = ("not possible", "does not fit", "cannot be built there", "slower than speech", "real time", "best")


def draw_sweep(plans: Sequence[TargetPlan], path: Path) -> None:
    """Write the picture; its kind follows from the file's name.

    A field says the memory in GB, decode tokens/s, and seconds of work for a second of speech.

    Raises:
        ExportError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    names = [row.recipe.name for row in plans[0].recipes]
    figure = Figure(figsize=(1.6 + 1.25 * len(names), 1.4 + 0.52 * len(plans)), layout="constrained")
    axes = figure.subplots()
    _fill(axes, plans)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(plans)), [plan.machine.name for plan in plans])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        f"{plans[0].model}, context {plans[0].context}: GB in memory, tokens/s, seconds of work for a second of speech",
        fontsize=9,
    )
    _legend(figure)
    try:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}. Choose another file") from error


def _fill(axes: Any, plans: Sequence[TargetPlan]) -> None:
    from matplotlib.colors import ListedColormap

    states = [[_state(plan, row) for row in plan.recipes] for plan in plans]
    axes.imshow(states, cmap=ListedColormap(_STATES), vmin=0, vmax=len(_STATES) - 1, aspect="auto")
    for y, plan in enumerate(plans):
        for x, row in enumerate(plan.recipes):
            colour = "white" if states[y][x] in (1, len(_STATES) - 1) else "black"
            axes.text(x, y, _text(row), ha="center", va="center", fontsize=7, color=colour)


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=word) for colour, word in zip(_STATES, _WORDS, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _state(plan: TargetPlan, row: RecipePlan) -> int:
    if row.memory is None or row.speed is None:
        return 0
    if not row.fits:
        return 1
    if not row.builds:
        return 2
    if row.recipe.name == plan.best:
        return 5
    return 4 if row.speed.real_time else 3


def _text(row: RecipePlan) -> str:
    if row.memory is None or row.speed is None:
        return "-"
    speech = "" if row.speed.speech is None else f"\n{row.speed.speech:.2f} s"
    return f"{row.memory.total / 1e9:.1f} GB, {row.speed.decode:.0f}/s{speech}"
