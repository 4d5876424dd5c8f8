"""A heat map of plans: devices by recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation import plots
from .plan import RecipePlan, TargetPlan

#: verdict on a device and recipe -> colour of its field
_STATES = {
    "not possible": "#d9d9d9",
    "does not fit": "#c9686a",
    "cannot be built there": "#d9a27c",
    "slower than speech": "#ecdc9f",
    "speaks in real time": "#9ccb9c",
}


def draw_sweep(plans: Sequence[TargetPlan], path: Path) -> None:
    """Write the picture as .svg or .png, by the file's suffix.

    Each field holds the memory in GB, decode tokens/s, and seconds of work for a second of speech.

    Raises:
        UsageError: the file cannot be written.
    """
    names = [row.recipe.name for row in plans[0].recipes]
    figure = plots.figure(1.6 + 1.25 * len(names), 1.4 + 0.52 * len(plans))
    axes = figure.subplots()
    _fill(axes, plans)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(plans)), [plan.machine.name for plan in plans])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{plans[0].model}, context {plans[0].context}: GB in memory, tokens/s, seconds of work for a second of speech",
        fontsize=9,
    )
    _legend(figure)
    plots.write(figure, path)


def _fill(axes: Any, plans: Sequence[TargetPlan]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    states = [[_state(row) for row in plan.recipes] for plan in plans]
    axes.imshow(states, cmap=ListedColormap(list(_STATES.values())), vmin=0, vmax=len(_STATES) - 1, aspect="auto")
    for y, plan in enumerate(plans):
        for x, row in enumerate(plan.recipes):
            axes.text(x, y, _text(row), ha="center", va="center", fontsize=7)
            if row.recipe.name == plan.best:
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, linewidth=2))


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=word) for word, colour in _STATES.items()]
    patches.append(Patch(fill=False, linewidth=2, label="best recipe of a device"))
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _state(row: RecipePlan) -> int:
    if row.memory is None or row.speed is None:
        return 0
    if not row.fits:
        return 1
    if not row.builds:
        return 2
    return 4 if row.speed.real_time else 3


def _text(row: RecipePlan) -> str:
    if row.memory is None or row.speed is None:
        return "-"
    speech = "" if row.speed.speech is None else f"\n{row.speed.speech:.2f} s"
    return f"{row.memory.total / 1e9:.1f} GB, {row.speed.decode:.0f}/s{speech}"
