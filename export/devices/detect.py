"""Detect this machine's GPU as a target."""

from __future__ import annotations

import re
from dataclasses import replace

from omniport.runtime.errors import BackendError, UsageError
from omniport.runtime.system import host

from .catalog import TARGETS, THIS, Target, precisions_of


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
    try:
        return gpu_target(host.read_gpu())
    except BackendError as error:
        raise BackendError(
            f"{error}, or name the machine to build for with --target (omniport targets lists them)"
        ) from error


def gpu_target(gpu: host.Gpu) -> Target:
    """The known target that a GPU is, or one made of what the driver says. Its name is ``this`` either way."""
    words = set(re.split(r"[^a-z0-9]+", gpu.name.lower()))
    for target in TARGETS.values():
        # boards of one name come in several sizes; the driver sees a little less than is soldered on
        size_fits = 0.85 <= gpu.memory_bytes / target.memory_bytes <= 1.05
        if target.capability == gpu.capability and words & set(target.name_parts) and size_fits:
            return replace(target, name=THIS, memory_bytes=gpu.memory_bytes)
    return Target(
        name=THIS,
        title=gpu.name,
        capability=gpu.capability,
        memory_bytes=gpu.memory_bytes,
        unified=gpu.integrated,
        bandwidth=gpu.bandwidth or None,
        fp16_flops=None,
        precisions=precisions_of(gpu.capability),
    )
