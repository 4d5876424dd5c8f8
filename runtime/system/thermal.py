"""How warm the machine is, and whether it slows down for that, as Linux tells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/class/thermal")
#: parts of the names of cooling devices that cool by slowing a processor down; others are fans
_SLOWING = ("cpu", "gpu", "processor", "devfreq", "throttle")


def temperatures(root: Path = _ROOT) -> dict[str, float]:
    """Degrees Celsius by thermal zone, without those that are off; a number tells zones of one name apart."""
    found: dict[str, float] = {}
    for folder, kind in _kinds(root, "thermal_zone"):
        with suppress(OSError, ValueError):  # of a part that is switched off
            degrees = int((folder / "temp").read_text()) / 1000
            found[f"{kind}-{folder.name.removeprefix('thermal_zone')}" if kind in found else kind] = degrees
    return found


def throttled(root: Path = _ROOT) -> bool:
    """Whether a processor is slowed down now."""
    for folder, kind in _kinds(root, "cooling_device"):
        with suppress(OSError, ValueError):
            slows = any(name in kind.lower() for name in _SLOWING)
            if slows and int((folder / "cur_state").read_text()) > 0:
                return True
    return False


def _kinds(root: Path, name: str) -> Iterator[tuple[Path, str]]:
    for folder in sorted(root.glob(f"{name}*")):
        with suppress(OSError, ValueError):
            yield folder, (folder / "type").read_text().strip()
