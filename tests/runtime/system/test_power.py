"""The power mode from files like those of a Jetson and of a PC."""

from __future__ import annotations

from pathlib import Path

from omniport.runtime.system.power import power_mode

MODES = """\
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=0 >
"""


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_jetson_says_its_mode_by_name(tmp_path: Path) -> None:
    put(tmp_path, "etc/nvpmodel.conf", MODES)
    put(tmp_path, "var/lib/nvpmodel/status", "pmode:0002")
    assert power_mode(tmp_path) == "MAXN_SUPER"


def test_a_mode_without_a_name_is_its_number(tmp_path: Path) -> None:
    put(tmp_path, "var/lib/nvpmodel/status", "pmode:0003 fmode:fanNull")
    assert power_mode(tmp_path) == "3"


def test_a_pc_says_its_profile(tmp_path: Path) -> None:
    put(tmp_path, "sys/firmware/acpi/platform_profile", "balanced\n")
    assert power_mode(tmp_path) == "balanced"


def test_nothing_is_told_where_nothing_tells(tmp_path: Path) -> None:
    assert power_mode(tmp_path) is None
    (tmp_path / "var/lib/nvpmodel/status").mkdir(parents=True)
    put(tmp_path, "sys/firmware/acpi/platform_profile", "")
    assert power_mode(tmp_path) is None
