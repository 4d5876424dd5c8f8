"""Machines of a plan: memory, and the rates that graphs reach on it.

The factors between what a machine could do and what graphs reach are measured, here or by others; docs/plan.md says
where each comes from. What nobody measured is called assumed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from omniport.runtime.backends.onnxruntime.product_rate import product_rate
from omniport.runtime.errors import UsageError
from omniport.runtime.system.host import physical_cores, total_memory
from omniport.runtime.system.rates import read_bandwidth

from ..devices.catalog import TARGETS, THIS, Target
from ..devices.detect import find_target

#: the name of this machine's processor
CPU = "cpu"

#: share of the specified bandwidth that reading weights reaches in a decode step, and seconds a layer that are not
#: reading: fitted to the published 27 / 45 / 72 tokens/s of a 3B on AGX Orin
GPU_READING, GPU_LAYER = 0.85, 45e-6
#: shares of the dense rate that prefill reaches: products in a format of the tensor cores (NVFP4 on Thor), weights that
#: are unpacked first on Thor (INT4 there), on older GPUs (assumed), and convolutions (assumed)
NATIVE, UNPACKED_NEW, UNPACKED, CONVOLVED = 0.45, 0.11, 0.3, 0.25

#: share of the measured read bandwidth that a decode step's weights reach in ONNX Runtime
CPU_READING = 0.95
#: seconds a layer of a step that are not reading, with two threads
CPU_LAYER = 200e-6
#: values of integer weights that a step unpacks for one FP32 operation of a product
CPU_UNPACKING: Mapping[int, float] = {8: 0.25, 4: 0.25}
#: rates of products with many rows over that of numpy's FP32 product, by bits of the weights; convolutions apart
CPU_PRODUCTS: Mapping[str, float] = {"fp32": 0.75, "8": 1.1, "4": 1.0, "convolution": 0.5}
#: bytes a value of integer weights as MatMulNBits keeps it: with an FP32 scale and a block sum for 32 values
CPU_PACKED: Mapping[int, float] = {8: 1.25, 4: 0.75}
#: Python, ONNX Runtime and what a session holds besides
CPU_PROCESS = 150 << 20
#: left to the system
CPU_RESERVE = 1 << 30


@dataclass(frozen=True)
class Rates:
    """What a processor was measured to do: bytes read and FP32 operations of a matrix product, a second."""

    bandwidth: float
    products: float


@dataclass(frozen=True)
class Machine:
    """A machine as a plan sees it.

    Attributes:
        usable: bytes that weights, caches and activations may take.
        bandwidth: bytes a second at which a decode step reads weights and cache.
        layer: seconds a layer of one run that are neither reading nor computing.
        precision: what graphs are exported in when a recipe quantizes the rest.
        formats: number formats that it has.
        rates: operations a second that products reach, by format, and by ``8`` and ``4`` for unpacked weights.
        packed: bytes a value of quantized weights in memory, by bits, where that differs from the file.
        unpacking: values of quantized weights a second that a step with one row gets through, by bits, where that and
            not the memory may be what limits it.
        process: bytes of the program itself, where they are not part of what ``usable`` leaves out.
        target: the GPU; None for a CPU.
    """

    name: str
    title: str
    memory: int
    usable: int
    bandwidth: float
    layer: float
    precision: str
    formats: tuple[str, ...]
    rates: Mapping[str, float]
    packed: Mapping[int, float] = field(default_factory=dict)
    unpacking: Mapping[int, float] = field(default_factory=dict)
    process: int = 0
    target: Target | None = None

    @property
    def builds_itself(self) -> bool:
        """Whether engines are built in the memory that they run in."""
        return self.target is not None and self.target.unified and not self.target.built_anywhere


def find_machines(name: str, bandwidth: float | None = None) -> list[Machine]:
    """The machine of a target's name, ``cpu``, or all of the table for ``all``.

    Args:
        bandwidth: bytes a second, instead of the specified or measured ones.

    Raises:
        UsageError: an unknown name; lists the known ones.
        BackendError: ``this`` where there is no GPU.
    """
    if name == "all":
        return [machine_of(target, bandwidth) for target in TARGETS.values()]
    if name == CPU:
        rates = measure_rates()
        return [cpu_machine(rates if bandwidth is None else Rates(bandwidth, rates.products))]
    if name not in TARGETS and name != THIS:
        raise UsageError(f"no target named {name!r}; known: {', '.join((*TARGETS, THIS, CPU, 'all'))}")
    return [machine_of(find_target(name), bandwidth)]


def machine_of(target: Target, bandwidth: float | None = None) -> Machine:
    """A GPU by its specification.

    Raises:
        UsageError: a GPU whose bandwidth or arithmetic nobody has written down.
    """
    specified = bandwidth or target.bandwidth
    if specified is None or target.fp16_flops is None:
        raise UsageError(
            f"{target.title} is not in the table of targets, so that its rates are not known; plan for the one that is "
            f"most like it: {', '.join(TARGETS)}"
        )
    half = target.fp16_flops
    # the tensor memory of SM100 to SM119 is not what today's kernels for packed weights use
    unpacked = half * (UNPACKED_NEW if 10 <= float(target.capability) < 12 else UNPACKED)
    rates = {
        # TF32 on the tensor cores from Ampere on, the other cores before
        "fp32": half * NATIVE / (2 if "bf16" in target.precisions else 4),
        "fp16": half * NATIVE,
        "bf16": half * NATIVE,
        "int8": (target.int8_ops or 0) * NATIVE,
        "fp8": (target.fp8_flops or 0) * NATIVE,
        "8": unpacked,
        "4": unpacked,
        "convolution": half * CONVOLVED,
    }
    return Machine(
        name=target.name,
        title=target.title,
        memory=target.memory_bytes,
        usable=target.memory_usable,
        bandwidth=specified * (1.0 if bandwidth else GPU_READING),
        layer=GPU_LAYER,
        precision="fp16",
        formats=target.precisions,
        rates=rates,
        target=target,
    )


def cpu_machine(rates: Rates, memory: int | None = None) -> Machine:
    """This machine's processor with ONNX Runtime, whose kernels are those of FP32 and of packed integers.

    Args:
        memory: bytes; what the system has if None.
    """
    total = memory or total_memory() or 0
    return Machine(
        name=CPU,
        title=f"this machine's CPU, {physical_cores()} cores",
        memory=total,
        usable=total - CPU_RESERVE,
        bandwidth=rates.bandwidth * CPU_READING,
        layer=CPU_LAYER,
        precision="fp32",
        formats=("fp32", "int8", "int4"),
        rates={name: factor * rates.products for name, factor in CPU_PRODUCTS.items()},
        packed=CPU_PACKED,
        unpacking={bits: factor * rates.products for bits, factor in CPU_UNPACKING.items()},
        process=CPU_PROCESS,
    )


def measure_rates(tries: int = 20) -> Rates:
    """Read bandwidth and FP32 matrix products of this machine's processor, the best of so many tries."""
    return Rates(read_bandwidth(physical_cores(), tries), product_rate(physical_cores(), tries))
