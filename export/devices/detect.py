"""The machine's own GPU, asked of the CUDA driver without any CUDA package."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

from omniport.runtime.errors import BackendError, UsageError

from .catalog import TARGETS, THIS, Target, precisions_of

# CUdevice_attribute of cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_INTEGRATED = 18
_MEMORY_CLOCK_KHZ, _BUS_WIDTH_BITS = 36, 37


@dataclass(frozen=True)
class Device:
    """What the driver says about a GPU. ``bandwidth``: bytes a second by clock and bus width; 0 if it is silent."""

    name: str
    capability: str
    memory_bytes: int
    integrated: bool
    bandwidth: float


def find_target(name: str) -> Target:
    """The target of that name; ``this`` asks the driver for the machine's own GPU.

    Raises:
        UsageError: an unknown name; lists the known ones.
        BackendError: ``this`` on a machine without a usable NVIDIA GPU.
    """
    if name == THIS:
        return this_target()
    if name not in TARGETS:
        raise UsageError(f"no target named {name!r}; known: {', '.join((*TARGETS, THIS))}")
    return TARGETS[name]


def this_target() -> Target:
    """The machine's first GPU as a target.

    Raises:
        BackendError: no driver, no GPU, or a driver call that failed.
    """
    return device_target(read_device(_driver()))


def device_target(device: Device) -> Target:
    """The known target that a device is, or one made of what the driver says. Its name is ``this`` either way."""
    words = set(re.split(r"[^a-z0-9]+", device.name.lower()))
    for target in TARGETS.values():
        # boards of one name come in several sizes; the driver sees a little less than is soldered on
        size_fits = 0.85 <= device.memory_bytes / target.memory_bytes <= 1.05
        if target.capability == device.capability and words & set(target.name_parts) and size_fits:
            return replace(target, name=THIS, memory_bytes=device.memory_bytes)
    return Target(
        name=THIS,
        title=device.name,
        capability=device.capability,
        memory_bytes=device.memory_bytes,
        unified=device.integrated,
        bandwidth=device.bandwidth or None,
        fp16_flops=None,
        precisions=precisions_of(device.capability),
    )


def read_device(driver: Any, ordinal: int = 0) -> Device:
    """Ask the driver library about one GPU.

    Args:
        driver: libcuda as ctypes loads it.

    Raises:
        BackendError: a call failed or there is no GPU.
    """
    _call(driver, "cuInit", 0)
    count, handle = ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if count.value <= ordinal:
        raise BackendError(f"the CUDA driver knows {count.value} GPUs: {_ELSEWHERE}")
    _call(driver, "cuDeviceGet", ctypes.byref(handle), ordinal)
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), handle)
    memory = ctypes.c_size_t()
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        return value.value

    return Device(
        name=name.value.decode(errors="replace"),
        capability=f"{attribute(_CAPABILITY_MAJOR)}.{attribute(_CAPABILITY_MINOR)}",
        memory_bytes=memory.value,
        integrated=bool(attribute(_INTEGRATED)),
        # double data rate: two transfers a clock
        bandwidth=2.0 * attribute(_MEMORY_CLOCK_KHZ) * 1e3 * attribute(_BUS_WIDTH_BITS) / 8,
    )


_ELSEWHERE = "name the machine to build for with --target (omniport targets lists them)"


def _driver() -> Any:
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(library)
    except OSError as error:
        raise BackendError(
            f"no NVIDIA GPU can be used here: the CUDA driver does not load ({error}). Install NVIDIA's driver, or "
            f"{_ELSEWHERE}"
        ) from error


def _call(driver: Any, name: str, *arguments: Any) -> None:
    status = int(getattr(driver, name)(*arguments))
    if status:
        raise BackendError(
            f"no NVIDIA GPU can be used here: {name} of the CUDA driver gave error {status}. Check nvidia-smi, or "
            f"{_ELSEWHERE}"
        )
