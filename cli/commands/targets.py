"""omniport targets"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..common import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from omniport.export.devices.catalog import Target

NAME = "targets"
EXAMPLE = "omniport targets --json"


def command(json: JsonFlag = False) -> None:
    """List the machines that engines can be built for.

    The name `this` stands for the machine's own GPU, as the CUDA driver describes it.
    """
    rows = _targets()
    if json:
        print_json([target_dict(target) for target in rows])
        return
    columns = ("target", "GPU", "memory", "GB/s", "precisions", "TensorRT", "built")
    print_table("Targets", columns, (_row(target) for target in rows))


def target_dict(target: Target) -> dict[str, Any]:
    """A target as plain JSON values."""
    return {
        "name": target.name,
        "title": target.title,
        "compute_capability": target.capability,
        "memory_bytes": target.memory_bytes,
        "unified_memory": target.unified,
        "bandwidth_bytes_per_s": target.bandwidth,
        "measured_bandwidth_bytes_per_s": target.measured_bandwidth,
        "fp16_flops": target.fp16_flops,
        "precisions": list(target.precisions),
        "jetpacks": [{"version": release.version, "tensorrt": release.tensorrt} for release in target.jetpacks],
        "builder": target.builder,
        "built_anywhere": target.built_anywhere,
    }


def _targets() -> list[Target]:
    from omniport.export.devices.catalog import TARGETS
    from omniport.export.devices.detect import this_target
    from omniport.runtime.errors import BackendError

    rows = list(TARGETS.values())
    with suppress(BackendError):  # no GPU here: nothing to list
        rows.append(this_target())
    return rows


def _row(target: Target) -> tuple[str, ...]:
    rate = "?" if target.bandwidth is None else f"{target.bandwidth / 1e9:.0f}"
    if target.measured_bandwidth is not None:
        rate += f" ({target.measured_bandwidth / 1e9:.0f} measured)"
    memory = f"{target.memory_bytes / (1 << 30):.0f} GiB" + (" unified" if target.unified else "")
    releases = ", ".join(f"{r.tensorrt} (JetPack {r.version})" for r in target.jetpacks)
    where = "anywhere, tensorrt-rtx" if target.built_anywhere else "on the device"
    precisions = " ".join(target.precisions)
    return target.name, f"{target.title}, {target.sm}", memory, rate, precisions, releases or "any", where
