"""How much power the machine may take, as it was set: a Jetson's mode, or the profile of a PC's firmware."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

#: which of a Jetson's modes is set (``pmode:0002``), and the names of all of them; nvpmodel writes and reads these
_JETSON_MODE = "var/lib/nvpmodel/status"
_JETSON_MODES = "etc/nvpmodel.conf"
_PROFILE = "sys/firmware/acpi/platform_profile"
_MODE = re.compile(r"pmode:\s*(\d+)")
_NAME = re.compile(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", re.MULTILINE)


def power_mode(root: Path = Path("/")) -> str | None:
    """Such as ``MAXN`` or ``15W`` of a Jetson, or ``balanced`` of a PC; None where nothing tells."""
    set_mode = _MODE.search(_read(root / _JETSON_MODE))
    if set_mode:
        number = int(set_mode[1])
        names: dict[int, str] = {int(found): name for found, name in _NAME.findall(_read(root / _JETSON_MODES))}
        return names.get(number, str(number))
    return _read(root / _PROFILE).strip() or None


def _read(path: Path) -> str:
    with suppress(OSError, UnicodeError):
        return path.read_text(encoding="utf-8")
    return ""
