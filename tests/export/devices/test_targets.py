"""Targets: the table, the machine's own GPU as a driver describes it, the command."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any

import pytest
from omniport.cli.main import app
from omniport.export.devices.catalog import PRECISION_NAMES, RTX_CAPABILITIES, TARGETS, nearest_rtx_capability
from omniport.export.devices.detect import find_target, gpu_target, this_target
from omniport.runtime.errors import BackendError, UsageError
from omniport.runtime.system.host import Gpu, gpu_capability
from typer.testing import CliRunner

JETSON = ("orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "agx-thor")
CARDS = ("rtx-2080", "rtx-3090", "rtx-4090", "rtx-5090", "l4", "a10", "a100", "h100", "h200", "dgx-spark")
NAMES = [*(f"jetson-{name}" for name in JETSON), *CARDS]


def test_every_target_is_there_and_complete() -> None:
    assert list(TARGETS) == NAMES
    for name, target in TARGETS.items():
        assert target.name == name
        assert set(target.precisions) <= set(PRECISION_NAMES)
        assert target.bandwidth is not None
        assert 60e9 < target.bandwidth < 1e13
        assert 7 << 30 < target.memory_bytes < 150 << 30
        assert target.measured_bandwidth is None or target.measured_bandwidth < target.bandwidth
        assert bool(target.jetpacks) == name.startswith("jetson")


@pytest.mark.parametrize(
    ("name", "capability", "has", "lacks", "builder"),
    [
        ("jetson-orin-nano-8gb", "8.7", {"fp16", "bf16", "int8", "int4"}, {"fp8"}, "tensorrt"),
        ("jetson-agx-thor", "11.0", {"fp8", "fp4"}, set(), "tensorrt"),
        ("rtx-2080", "7.5", {"fp16", "int8"}, {"bf16", "fp8"}, "tensorrt-rtx"),
        ("rtx-3090", "8.6", {"bf16", "int4"}, {"fp8"}, "tensorrt-rtx"),
        ("rtx-4090", "8.9", {"fp8"}, {"fp4"}, "tensorrt-rtx"),
        ("a100", "8.0", {"bf16"}, {"fp8"}, "tensorrt"),
        ("h200", "9.0", {"fp8"}, {"fp4"}, "tensorrt"),
        ("dgx-spark", "12.1", {"fp8", "fp4"}, set(), "tensorrt-rtx"),
    ],
)
def test_what_targets_have(name: str, capability: str, has: set[str], lacks: set[str], builder: str) -> None:
    target = find_target(name)
    assert target.capability == capability
    assert has <= set(target.precisions)
    assert not lacks & set(target.precisions)
    assert target.builder == builder
    assert target.built_anywhere == (builder == "tensorrt-rtx")


def test_releases_of_jetson_boards() -> None:
    """TensorRT 11.4 names AGX Orin and Thor; what else there is of Orin stays with 10.x."""
    newest = {name: TARGETS[f"jetson-{name}"].jetpacks[-1].tensorrt for name in JETSON}
    assert {name for name, tensorrt in newest.items() if tensorrt == "11.4"} == {
        "agx-orin-32gb",
        "agx-orin-64gb",
        "agx-thor",
    }
    for target in TARGETS.values():
        versions = [tuple(map(int, release.tensorrt.split("."))) for release in target.jetpacks]
        assert versions == sorted(versions)


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'rtx-9090'; known: jetson-orin-nano-8gb.*dgx-spark, this"):
        find_target("rtx-9090")


def test_nearest_capability() -> None:
    found = {name: nearest_rtx_capability(TARGETS[name].capability) for name in NAMES}
    assert found["jetson-agx-orin-64gb"] == "8.6"
    assert found["h100"] == "8.9"
    assert found["jetson-agx-thor"] == "8.9"
    assert nearest_rtx_capability("5.0") == "7.5"
    assert all(found[name] == TARGETS[name].capability for name in NAMES if TARGETS[name].built_anywhere)


def test_rtx_capabilities_are_those_of_the_package() -> None:
    rtx: Any = pytest.importorskip("tensorrt_rtx")
    known = {name for name in dir(rtx.ComputeCapability) if name.startswith("SM")}
    assert {"SM" + capability.replace(".", "") for capability in RTX_CAPABILITIES} == known


class Driver:
    """libcuda with one GPU; every call is a C function that writes through pointers."""

    def __init__(self, name: str, attributes: dict[int, int], memory: int, count: int = 1, fails: str = "") -> None:
        self._name, self._attributes, self._memory, self._count, self._fails = name, attributes, memory, count, fails

    def __getattr__(self, call: str) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            if call == self._fails:
                return 999
            if call == "cuDeviceGetCount":
                arguments[0]._obj.value = self._count
            elif call == "cuDeviceGetName":
                arguments[0].value = self._name.encode()
            elif call == "cuDeviceTotalMem_v2":
                assert isinstance(arguments[0]._obj, ctypes.c_size_t)
                arguments[0]._obj.value = self._memory
            elif call == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self._attributes[arguments[1]]
            return 0

        return run


def put_gpu(patch: pytest.MonkeyPatch, name: str, capability: str, gib: float, **more: Any) -> None:
    """Have the machine's CUDA driver know this GPU."""
    major, _, minor = capability.partition(".")
    attributes = {75: int(major), 76: int(minor), 18: 0, 36: 10_000_000, 37: 256}
    driver = Driver(name, attributes, int(gib * (1 << 30)), **more)
    patch.setattr(ctypes, "CDLL", lambda library: driver)


@pytest.mark.parametrize(
    ("name", "capability", "gib", "known"),
    [
        ("NVIDIA GeForce RTX 4090", "8.9", 23.6, "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "8.0", 79.2, "a100"),
        ("NVIDIA H100 80GB HBM3", "9.0", 79.1, "h100"),
        ("NVIDIA H200", "9.0", 139.8, "h200"),
        ("Orin", "8.7", 7.4, "jetson-orin-nano-8gb"),
        ("Orin", "8.7", 61.4, "jetson-agx-orin-64gb"),
        ("NVIDIA L40S", "8.9", 44.4, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9", 15.6, None),
        ("NVIDIA GeForce RTX 4070", "8.9", 11.7, None),
    ],
)
def test_the_machines_own_gpu(
    name: str, capability: str, gib: float, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_gpu(monkeypatch, name, capability, gib)
    assert gpu_capability() == capability
    target = this_target()
    assert target.name == "this"
    assert target.capability == capability
    assert target.memory_bytes == int(gib * (1 << 30))
    if known is None:
        assert target.title == name
        assert target.bandwidth == 640e9  # 10 GHz, two transfers a clock, 256 bits
        assert "fp8" in target.precisions
    else:
        assert target.title == TARGETS[known].title
        assert target.bandwidth == TARGETS[known].bandwidth


def test_a_machine_without_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch, "x", "8.9", 1, count=0)
    with pytest.raises(BackendError, match=r"knows 0 GPUs.*--target"):
        this_target()
    put_gpu(monkeypatch, "x", "8.9", 1, fails="cuInit")
    with pytest.raises(BackendError, match=r"cuInit of the CUDA driver gave error 999: .*--target"):
        this_target()

    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(BackendError, match=r"driver does not load \(libcuda.*--target"):
        this_target()
    assert gpu_capability() is None


def test_devices_without_a_clock_have_no_bandwidth() -> None:
    assert gpu_target(Gpu("x", "8.9", 1 << 30, True, 0.0)).bandwidth is None


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch, "NVIDIA L40S", "8.9", 44.4)
    result = CliRunner().invoke(app, ["targets", "--json"])
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert list(rows) == [*NAMES, "this"]
    assert rows["this"]["title"] == "NVIDIA L40S"
    orin = rows["jetson-agx-orin-64gb"]
    assert orin["measured_bandwidth_bytes_per_s"] == 153e9
    assert orin["jetpacks"][0] == {"version": "6.2", "tensorrt": "10.3"}
    assert not orin["built_anywhere"]
    table = CliRunner().invoke(app, ["targets"])
    assert all(name in table.stdout for name in (*NAMES, "this"))
