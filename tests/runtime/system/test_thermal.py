"""Temperatures and throttling from a folder like Linux' /sys/class/thermal."""

from __future__ import annotations

from pathlib import Path

from omniport.runtime.system.thermal import temperatures, throttled


def put(root: Path, name: str, **files: str) -> None:
    folder = root / name
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


def test_zones(tmp_path: Path) -> None:
    put(tmp_path, "thermal_zone0", type="cpu-thermal", temp="51500")
    put(tmp_path, "thermal_zone1", type="gpu-thermal", temp="-1000")
    put(tmp_path, "thermal_zone2", type="cpu-thermal", temp="48000")
    put(tmp_path, "thermal_zone3", type="cv-thermal", temp="off")
    put(tmp_path, "thermal_zone4", temp="1000")
    assert temperatures(tmp_path) == {"cpu-thermal": 51.5, "gpu-thermal": -1.0, "cpu-thermal-2": 48.0}


def test_a_fan_slows_nothing_down(tmp_path: Path) -> None:
    put(tmp_path, "cooling_device0", type="pwm-fan", cur_state="3")
    put(tmp_path, "cooling_device1", type="cpufreq-cpu0", cur_state="0")
    assert not throttled(tmp_path)
    (tmp_path / "cooling_device1" / "cur_state").write_text("2\n")
    assert throttled(tmp_path)


def test_nothing_is_known(tmp_path: Path) -> None:
    assert temperatures(tmp_path / "none") == {}
    assert not throttled(tmp_path / "none")
