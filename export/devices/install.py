"""What a machine with an NVIDIA GPU should install: which ONNX Runtime, which builder of engines, and where it is."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from omniport.runtime.backends.onnxruntime.packages import gpu_published
from omniport.runtime.backends.tensorrt.packages import EXTRAS, JETPACK, NVIDIA_INDEX, how_to_install
from omniport.runtime.system import host

from .catalog import RTX_RUNS_ON


@dataclass(frozen=True)
class Machine:
    """What decides.

    Attributes:
        system: ``sys.platform``.
        processor: ``platform.machine()``.
        capability: compute capability of the first GPU; None if none can be used.
        jetson: JetPack's system, which has a TensorRT of its own.
    """

    system: str
    processor: str
    capability: str | None
    jetson: bool = False


@dataclass(frozen=True)
class Advice:
    """What to install.

    Attributes:
        onnxruntime: the extra, ``ort`` or ``ort-gpu``.
        builder: ``tensorrt-rtx`` or ``tensorrt``; empty without a GPU.
        extra: the extra that brings the builder; empty where pip does not.
        options: of ``pip install``, which it needs.
        how: how the builder is installed, or why there is none.
    """

    onnxruntime: str
    builder: str = ""
    extra: str = ""
    options: tuple[str, ...] = ()
    how: str = ""


def this_machine() -> Machine:
    """Ask the driver and the system."""
    return Machine(sys.platform, platform.machine(), host.gpu_capability(), host.is_jetson())


def advise(machine: Machine) -> Advice:
    """What a machine should install to use its GPU."""
    if machine.capability is None:
        return Advice("ort", how="no NVIDIA GPU that the CUDA driver can use: ONNX Runtime for the CPU")
    onnxruntime = "ort-gpu" if gpu_published(machine.processor) and not machine.jetson else "ort"
    builder = "tensorrt-rtx" if machine.capability in RTX_RUNS_ON else "tensorrt"
    how = how_to_install(builder, machine.jetson)
    extra = "" if how == JETPACK else EXTRAS[builder]
    return Advice(onnxruntime, builder, extra, tuple(NVIDIA_INDEX.split()) if NVIDIA_INDEX in how else (), how)
