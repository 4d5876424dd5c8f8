"""What the system says of this process and of the machine."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from omniport.runtime.system import host
from omniport.runtime.system.host import (
    collect_and_trim,
    cpu_name,
    driver_version,
    gpu_capability,
    peak_memory,
    physical_cores,
    resident_memory,
    total_memory,
    usable_cpus,
)
from support.interpreters import in_fresh_python

LINUX = sys.platform.startswith("linux")


def memory() -> int:
    found = resident_memory()
    assert found is not None
    return found


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library gives memory back by itself")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size = 100_000  # below the threshold above which glibc maps blocks, and so unmaps them when freed
    blocks = [libc.malloc(size) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one keeps the top of the heap in use
        libc.free(block)
    before = memory()
    collect_and_trim()
    assert before - memory() > 80 << 20
    libc.free(blocks[-1])


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_peak_memory_is_this_process_own() -> None:
    peak = peak_memory()
    assert memory() <= peak
    held = np.ones(64 << 20, np.uint8)
    assert peak_memory() >= max(peak, memory())
    assert held[0] == 1


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_watch_sees_what_is_gone_again() -> None:
    """In a process of its own: in this one, other tests' memory may go back to the system meanwhile."""
    code = (
        "import numpy as np\nfrom omniport.runtime.system.host import MemoryWatch\nwatch = MemoryWatch()\n"
        "held = np.ones(64 << 20, np.uint8)\nwatch.look()\ndel held\nprint(watch.peak())"
    )
    assert 64 << 20 <= int(in_fresh_python(code)) < 80 << 20


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_size_that_is_not_told() -> None:
    assert resident_memory("VmNone") is None


@pytest.mark.parametrize(("system", "library"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_the_driver_has_a_name_on_each_system(system: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str) -> None:
        asked.append(name)
        raise OSError("not found")

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert gpu_capability() is None
    assert asked == [library]


def test_the_driver_s_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None
    for said, version in (("580.65.06", "580.65.06"), ("[N/A]", None), ("", None)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert driver_version() == version


def test_a_jetson_is_known_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compatible = tmp_path / "compatible"
    monkeypatch.setattr(host, "_JETSON_FILES", (str(tmp_path / "nv_tegra_release"), str(compatible)))
    assert not host.is_jetson()
    compatible.write_bytes(b"raspberrypi,5\0")
    assert not host.is_jetson()
    compatible.write_bytes(b"nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    assert host.is_jetson()
    compatible.unlink()
    (tmp_path / "nv_tegra_release").touch()
    assert host.is_jetson()


def test_what_to_check_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Jetson and in containers nvidia-smi is missing, or prints N/A."""
    jetson, container = tmp_path / "nv_tegra_release", tmp_path / "dockerenv"
    monkeypatch.setattr(host, "_JETSON_FILES", (str(jetson), str(tmp_path / "compatible")))
    monkeypatch.setattr(host, "_CONTAINER_FILES", (str(container),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.what_to_check() == "install NVIDIA's driver"
    (tmp_path / "nvidia-smi").touch(0o755)
    assert host.what_to_check() == "check nvidia-smi"
    container.touch()
    assert host.what_to_check().startswith("start the container with --gpus all")
    jetson.touch()
    assert host.what_to_check().startswith("start the container with --runtime nvidia")
    container.unlink()
    assert host.what_to_check().startswith("check that JetPack is whole")


def test_the_machine() -> None:
    assert 1 <= physical_cores() <= len(usable_cpus()) <= (os.cpu_count() or 1)
    assert cpu_name()
    if LINUX:
        assert memory() < (total_memory() or 0)


@pytest.mark.skipif(not LINUX, reason="reads /proc/stat")
def test_the_processor_that_others_take_is_told_from_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 ticks of all CPUs, 400 pass in processes and the host; this process has 100 of them."""
    stat = ["cpu  1000 0 0 5000 0 0 0 0 0 0\n", "cpu  1250 20 30 5600 0 0 0 100 0 0\n"]
    own = [os.times_result((seconds, 0.0, 0.0, 0.0, 0.0)) for seconds in (1.0, 2.0)]
    monkeypatch.setattr(host.Path, "read_text", lambda *_, **__: stat.pop(0))
    monkeypatch.setattr(host.os, "times", lambda: own.pop(0))
    monkeypatch.setattr(host.os, "sysconf", lambda _: 100)
    assert host.BusyWatch().share() == pytest.approx(0.3)


def test_a_system_that_tells_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(host.Path, "read_text", missing)
    assert host.BusyWatch().share() is None


_FRAGMENTED = """
import sys
import torch
from omniport.runtime.system import host

if sys.argv[1] == "given back":
    host.give_back_large_blocks()
del_first = torch.ones(7 << 20)  # 28 MiB, after which glibc keeps as much
del del_first
small = []
before = host.resident_memory()
for _ in range(60):
    weights = torch.ones(2 << 20)
    small.append(torch.ones(32 << 10))  # outlives them, and takes a piece of their place
    del weights
    weights = torch.ones((2 << 20) + len(small) * 1024)
    del weights
print(host.resident_memory() - before)
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_weights_that_are_read_again_and_again_leave_nothing_behind() -> None:
    """60 blocks of 128 KiB stay: 8 MB."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("this C library gives memory back by itself")
    assert int(in_fresh_python(_FRAGMENTED, "given back")) < 24 << 20
