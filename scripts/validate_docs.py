"""Write the table of limits in docs/validate.md from `omniport.export.validation.tolerances`.

Usage: python -m scripts.validate_docs [--check]

``--check`` writes nothing and exits with 1 when the table is not what the code says (a test runs the same check).
"""

from __future__ import annotations

import argparse
import sys
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


def main() -> int:
    """Write or check the table."""
    parser = argparse.ArgumentParser(description="Write the table of limits in docs/validate.md from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the table has drifted")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    fresh = render(page)
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
    elif fresh != page:
        sys.stderr.write(f"{PAGE.name} does not hold the limits that the code says: run make docs\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
