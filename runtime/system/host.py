"""This process's memory, and the machine: memory, processor, cores, NVIDIA GPUs.

What a system does not tell is None. The CUDA driver is asked directly, so no CUDA package is needed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError

_STATUS = Path("/proc/self/status")
# M_MMAP_THRESHOLD of malloc.h
_MMAP_THRESHOLD = -3
# CUdevice_attribute of cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_INTEGRATED = 18
_MEMORY_CLOCK_KHZ, _BUS_WIDTH_BITS = 36, 37
#: files that only Jetson's system has
_JETSON_FILES = ("/etc/nv_tegra_release", "/proc/device-tree/compatible")
#: files that Docker and Podman put into a container
_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")


def resident_memory(field: str = "VmRSS") -> int | None:
    """A size from /proc/self/status in bytes; None where there is no such file.

    Args:
        field: VmRSS (now), VmHWM (the most so far), RssAnon (what cannot be dropped and read again), RssFile.
    """
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None on Windows."""
    peak = resident_memory("VmHWM")  # ru_maxrss would remember the process that started this one
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


class MemoryWatch:
    """The most resident memory seen above what there was at the start.

    Samples, because the kernel's own high-water mark cannot be reset without touching what others may read.
    """

    def __init__(self) -> None:
        self._start = self._peak = resident_memory() or 0

    def look(self) -> None:
        """Take a sample."""
        self._peak = max(self._peak, resident_memory() or 0)

    def peak(self) -> int:
        """Bytes above the start; a last sample is taken. 0 where the system does not tell."""
        self.look()
        return self._peak - self._start


def trim_heap() -> None:
    """Return freed memory to the system: glibc keeps freed blocks below 32 MiB for later."""
    with suppress(OSError, AttributeError):  # not glibc: nothing to trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_large_blocks() -> None:
    """From now on, return freed blocks of 1 MiB or more to the system at once, in the whole process.

    glibc keeps freed blocks of up to 32 MiB once such a one was freed. Where weights are read and freed again and again
    and something small outlives them each time, it soon holds many times of what is in use.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 20)


def collect_and_trim() -> None:
    """Collect garbage, and return freed memory to the system.

    A part's weights leave hundreds of MiB of small blocks, which the next part, of other shapes, cannot use: without
    this the peak grows from part to part.
    """
    gc.collect()
    trim_heap()


def total_memory() -> int | None:
    """Memory of the machine in bytes."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Bytes that can be had now without swapping, of the whole machine; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def cpu_name() -> str:
    """The processor's name, or its architecture where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cpus() -> set[int]:
    """Numbers of the CPUs (hyper-threads) that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores that this process may run on, at least 1: hyper-threads share the arithmetic units."""
    cores = set()
    for cpu in usable_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:  # not Linux, or no topology: count every CPU
            cores.add(str(cpu))
    return max(1, len(cores))


class BusyWatch:
    """How much of the processor other processes took since the watch began.

    What a virtual machine's host gave to other machines counts as well.
    """

    def __init__(self) -> None:
        self._begun = _other_ticks()

    def share(self) -> float | None:
        """Others' share of all CPUs' time since then, 0 to 1; None where the system does not tell."""
        now = _other_ticks()
        if now is None or self._begun is None:
            return None
        others, all_time = (max(0.0, late - early) for late, early in zip(now, self._begun, strict=True))
        return min(1.0, others / all_time) if all_time else 0.0


def _other_ticks() -> tuple[float, float] | None:
    """Ticks of all CPUs in other processes, and in all; None where there is no /proc/stat."""
    if sys.platform == "win32":
        return None
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        user, nice, system, idle, waiting, *interrupts_and_stolen = map(int, fields)
    except (OSError, ValueError, IndexError):
        return None
    busy = user + nice + system + sum(interrupts_and_stolen)
    own = os.times()
    return busy - (own.user + own.system) * os.sysconf("SC_CLK_TCK"), busy + idle + waiting


@dataclass(frozen=True)
class Gpu:
    """What the driver says about a GPU. ``bandwidth``: bytes a second by clock and bus width; 0 if it is silent."""

    name: str
    capability: str
    memory_bytes: int
    integrated: bool
    bandwidth: float


def tf32_asked() -> bool:
    """Whether ``OMNIPORT_TF32=1`` asks that float32 products be rounded to TF32: ten bits of 23 of a mantissa."""
    return os.environ.get("OMNIPORT_TF32") == "1"


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, ``8.9``; None if no GPU can be used."""
    try:
        return read_gpu().capability
    except BackendError:
        return None


def why_no_gpu() -> str:
    """Why no GPU can be used, and what to check; empty if one can."""
    try:
        read_gpu()
    except BackendError as error:
        return str(error)
    return ""


def read_gpu() -> Gpu:
    """Ask the CUDA driver about the first GPU.

    Raises:
        BackendError: no driver, no GPU, or a driver call that failed.
    """
    return read_gpus()[0]


def read_gpus() -> list[Gpu]:
    """Ask the CUDA driver about all GPUs, at least one.

    Raises:
        BackendError: no driver, no GPU, or a driver call that failed.
    """
    driver = load_cuda()
    _call(driver, "cuInit", 0)
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise BackendError("the CUDA driver knows 0 GPUs: check CUDA_VISIBLE_DEVICES")
    return [_read_gpu(driver, index) for index in range(count.value)]


def _read_gpu(driver: Any, index: int) -> Gpu:
    handle = ctypes.c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(handle), index)
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), handle)
    memory = ctypes.c_size_t()
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        return value.value

    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
        memory_bytes=memory.value,
        integrated=bool(attribute(_INTEGRATED)),
        # double data rate: two transfers a clock
        bandwidth=2.0 * attribute(_MEMORY_CLOCK_KHZ) * 1e3 * attribute(_BUS_WIDTH_BITS) / 8,
    )


def is_jetson() -> bool:
    """Whether the system is JetPack's."""
    for name in _JETSON_FILES:
        try:
            with open(name, "rb") as file:
                if name != _JETSON_FILES[1] or b"nvidia,tegra" in file.read(4096):
                    return True
        except OSError:
            continue
    return False


def what_to_check() -> str:
    """What to look at where the CUDA driver gives no GPU. nvidia-smi tells nothing on a Jetson, or is not there."""
    contained = any(map(os.path.exists, _CONTAINER_FILES))
    if is_jetson():
        started = "start the container with --runtime nvidia" if contained else "check that JetPack is whole"
        return f"{started} (on a Jetson the driver is part of JetPack, and nvidia-smi does not tell)"
    if contained:
        return "start the container with --gpus all, and check nvidia-smi on its host"
    return "check nvidia-smi" if shutil.which("nvidia-smi") else "install NVIDIA's driver"


def driver_version() -> str | None:
    """Version of NVIDIA's driver as nvidia-smi prints it; None where that is missing (Jetson) or does not know."""
    call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(call, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\d+(\.\d+)+", answer.stdout.strip())
    return found[0] if found else None


def load_cuda(path: str | None = None) -> Any:
    """The CUDA driver's library.

    Args:
        path: where it lies; the system's by default.

    Raises:
        BackendError: it does not load.
    """
    try:
        return ctypes.CDLL(path or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except OSError as error:
        raise BackendError(
            f"no NVIDIA GPU can be used here: the CUDA driver does not load ({error}): {what_to_check()}"
        ) from error


def _call(driver: Any, name: str, *arguments: Any) -> None:
    status = int(getattr(driver, name)(*arguments))
    if status:
        raise BackendError(
            f"no NVIDIA GPU can be used here: {name} of the CUDA driver gave error {status}: {what_to_check()}"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """``(10, 16, 1)`` of ``10.16.1.11``: what comes before the first part that is no number, three parts at most."""
    numbers: list[int] = []
    for part in version.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
