"""What a machine with an NVIDIA GPU should install: which ONNX Runtime, which builder of engines, and where it is."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from omniport.runtime.backends.onnxruntime.packages import gpu_published
from omniport.runtime.system import host

from .catalog import RTX_RUNS_ON

#: NVIDIA's own index: what the tensorrt packages of PyPI are made of is there and nowhere else
NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"
#: files that only Jetson's system has
_JETSON_FILES = ("/etc/nv_tegra_release", "/proc/device-tree/compatible")


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
    return Machine(sys.platform, platform.machine(), host.gpu_capability(), _is_jetson())


def advise(machine: Machine) -> Advice:
    """What a machine should install to use its GPU."""
    if machine.capability is None:
        return Advice("ort", how="no NVIDIA GPU that the CUDA driver can use: ONNX Runtime for the CPU")
    onnxruntime = "ort-gpu" if gpu_published(machine.processor) and not machine.jetson else "ort"
    if machine.capability in RTX_RUNS_ON:
        return Advice(onnxruntime, "tensorrt-rtx", "rtx", how="pip install 'omniport[rtx]'")
    if machine.jetson:
        how = (
            "sudo apt-get install nvidia-jetpack, then install omniport and onnx into a virtual environment made with "
            "--system-site-packages: TensorRT is JetPack's"
        )
        return Advice(onnxruntime, "tensorrt", how=how)
    how = f"pip install 'omniport[trt]' {NVIDIA_INDEX} (CUDA 13: driver 580 or newer)"
    return Advice(onnxruntime, "tensorrt", "trt", tuple(NVIDIA_INDEX.split()), how)


def _is_jetson() -> bool:
    for name in _JETSON_FILES:
        try:
            with open(name, "rb") as file:
                if name != _JETSON_FILES[1] or b"nvidia,tegra" in file.read(4096):
                    return True
        except OSError:
            continue
    return False
