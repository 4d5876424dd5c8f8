"""The table of limits in docs/validate.md, from `omniport.export.validation.tolerances`."""

from __future__ import annotations

from pathlib import Path

from omniport.export.validation.tolerances import LIMITS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "validate.md"

_START, _END = "<!-- limits: made by scripts/validate_docs.py -->\n", "<!-- end of limits -->\n"


def render(page: str) -> str:
    """The page with its table of limits made anew.

    Raises:
        ValueError: the page has no place for the table.
    """
    head, start, rest = page.partition(_START)
    _, end, tail = rest.partition(_END)
    if not (start and end):
        raise ValueError(f"{PAGE.name} has no place for the table: {_START!r} and {_END!r} were expected")
    return head + start + _table() + end + tail


def _table() -> str:
    """A row a figure: the limit in each precision, and the reasons."""
    precisions = list(dict.fromkeys(precision for _, precision in LIMITS))
    lines = [f"| figure | {' | '.join(precisions)} | why |", f"|---{'|---' * len(precisions)}|---|"]
    for figure in dict.fromkeys(figure for figure, _ in LIMITS):
        found = {precision: LIMITS[figure, precision] for precision in precisions if (figure, precision) in LIMITS}
        sign = "≥" if next(iter(found.values())).at_least else "≤"
        cells = [f"{sign} {found[p].value:g}" if p in found else "" for p in precisions]
        reasons: dict[str, list[str]] = {}
        for precision, limit in found.items():
            reasons.setdefault(limit.reason, []).append(precision)
        why = "; ".join(
            f"{', '.join(names)}: {reason}" if len(reasons) > 1 else reason for reason, names in reasons.items()
        )
        lines.append(f"| `{figure}` | {' | '.join(cells)} | {why} |")
    return "\n".join(lines) + "\n"
