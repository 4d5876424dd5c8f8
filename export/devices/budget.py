"""Memory of a target that engines may use, and memory that building one takes."""

from __future__ import annotations

from .catalog import Target

#: what the system, the driver and this program take of a unified memory; of a GPU's own memory the driver alone
UNIFIED_RESERVE, GPU_RESERVE = 2 * (1 << 30), 1 << 29
#: memory of a build over the graph's weights, and a constant, which the vocoder's 10,000 layers set: measured with
#: TensorRT-RTX (docs/results/build-matrix.md)
BUILD_FACTOR, BUILD_CONSTANT = 2.0, 750_000_000


def memory_usable(target: Target) -> int:
    """Bytes of the target's memory that engines may take."""
    return target.memory_bytes - (UNIFIED_RESERVE if target.unified else GPU_RESERVE)
