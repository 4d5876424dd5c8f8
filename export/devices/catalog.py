"""The catalogue of target devices: memory, bandwidth, number formats, and which builder serves them.

Figures are public: NVIDIA's data sheets and module specifications, TensorRT's and TensorRT-RTX's support matrices, and
JetPack's release notes (docs/build.md says which was looked up where, and which was not); bandwidths called measured
come from the reports named in docs/results/published.md.

Dense tensor-core rates are for FP16 with FP32 accumulation; for Orin they are tensor cores times clock times 512, which
is a quarter of the sparse INT8 figure that its data sheets give for the GPU. Rates of 8-bit formats follow from the
same sources: INT8 is twice FP16 where FP16 runs at full speed with FP32 accumulation (data-centre GPUs and Jetson) and
four times on GeForce, where that runs at half speed; FP8 with FP32 accumulation is twice FP16.
"""

from __future__ import annotations

from dataclasses import dataclass

#: number formats in the order in which they are shown
PRECISION_NAMES = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")

#: compute capabilities that tensorrt-rtx compiles for, on any machine (ComputeCapability of tensorrt_rtx 1.7)
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

#: those of them that TensorRT-RTX is made to run on: 8.0 is a data-centre GPU. Source: its support matrices, 1.0 to 1.5
RTX_RUNS_ON = ("7.5", "8.6", "8.9", "12.0", "12.1")

#: the name of the machine's own GPU, see `omniport.export.devices.detect`
THIS = "this"

GB = 10**9
GIB = 1 << 30

#: what the system, the driver and this program take of a unified memory; of a GPU's own memory the driver alone
UNIFIED_RESERVE, GPU_RESERVE = 2 * GIB, 1 << 29
#: memory of a build over the graph's weights, and a constant, which the vocoder's 12,400 layers set, most in INT8:
#: measured with TensorRT-RTX (docs/build.md)
BUILD_FACTOR, BUILD_CONSTANT = 2.0, 950_000_000


@dataclass(frozen=True)
class JetPack:
    """A release of NVIDIA's Jetson software, and the TensorRT that comes with it."""

    version: str
    tensorrt: str


@dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        capability: compute capability of its GPU, ``8.7``.
        memory_bytes: of the GPU, or of the whole machine where it is unified.
        unified: CPU and GPU share the memory: weights, caches, the system and this program all live in it.
        bandwidth: memory bytes a second by specification; None if nobody can say.
        measured_bandwidth: what programs were seen to reach; None if not known.
        fp16_flops: dense multiply-adds counted as two, FP16 with FP32 accumulation, a second.
        precisions: number formats that its tensor cores (or, for fp32, its other cores) compute in or unpack from.
        jetpacks: releases that exist for it, oldest first; none for a GPU that takes any TensorRT.
        name_parts: words of the driver's device name, one of which this machine's GPU has.
        int8_factor: dense INT8 operations for one in FP16.
    """

    name: str
    title: str
    capability: str
    memory_bytes: int
    unified: bool
    bandwidth: float | None
    fp16_flops: float | None
    precisions: tuple[str, ...]
    measured_bandwidth: float | None = None
    jetpacks: tuple[JetPack, ...] = ()
    name_parts: tuple[str, ...] = ()
    int8_factor: float = 2.0

    @property
    def int8_ops(self) -> float | None:
        """Dense INT8 operations a second on the tensor cores; None without them."""
        return None if self.fp16_flops is None or "int8" not in self.precisions else self.int8_factor * self.fp16_flops

    @property
    def fp8_flops(self) -> float | None:
        """Dense FP8 operations a second with FP32 accumulation; None without them."""
        return None if self.fp16_flops is None or "fp8" not in self.precisions else 2 * self.fp16_flops

    @property
    def sm(self) -> str:
        """``SM87`` for capability 8.7."""
        return "SM" + self.capability.replace(".", "")

    @property
    def memory_usable(self) -> int:
        """Bytes of the memory that engines may take."""
        return self.memory_bytes - (UNIFIED_RESERVE if self.unified else GPU_RESERVE)

    @property
    def built_anywhere(self) -> bool:
        """Whether tensorrt-rtx builds its engines on any machine.

        If not, they come from the TensorRT on the machine itself: Jetson boards and data-centre GPUs.
        """
        return not self.jetpacks and self.capability in RTX_RUNS_ON

    @property
    def builder(self) -> str:
        """The builder that ``--builder auto`` takes."""
        return "tensorrt-rtx" if self.built_anywhere else "tensorrt"


def precisions_of(capability: str) -> tuple[str, ...]:
    """Number formats of a compute capability's tensor cores.

    Source: "Hardware and Precision" tables of the support matrices of TensorRT 10.15 and TensorRT-RTX 1.4 and 1.5.
    Turing's INT8 is TensorRT's alone: TensorRT-RTX gives 7.5 FP32 and FP16 only. Its INT8 and INT4 are for weights.
    """
    number = tuple(int(part) for part in capability.split("."))
    found = ["fp32"]
    if number >= (7, 0):
        found.append("fp16")
    if number >= (8, 0):
        found.append("bf16")
    if number >= (7, 2):
        found.append("int8")
    if number >= (8, 0):
        found.append("int4")
    if number >= (8, 9):
        found.append("fp8")
    if number >= (10, 0):
        found.append("fp4")
    return tuple(found)


_ORIN = (JetPack("6.2", "10.3"), JetPack("7.2", "10.16"))
# TensorRT 11.4.1 names AGX Orin and Thor, and no other Orin
_AGX_ORIN = (*_ORIN, JetPack("7.2.2", "11.4"))
_THOR = (JetPack("7.1", "10.13"), JetPack("7.2", "10.16"), JetPack("7.2.2", "11.4"))


def _jetson(
    name: str,
    title: str,
    gib: int,
    bandwidth: float,
    tflops: float,
    measured: float | None = None,
    jetpacks: tuple[JetPack, ...] = _ORIN,
) -> Target:
    thor = jetpacks is _THOR
    capability = "11.0" if thor else "8.7"
    return Target(
        name=name,
        title=title,
        capability=capability,
        memory_bytes=gib * GIB,
        unified=True,
        bandwidth=bandwidth * GB,
        measured_bandwidth=None if measured is None else measured * GB,
        fp16_flops=tflops * 1e12,
        precisions=precisions_of(capability),
        jetpacks=jetpacks,
        name_parts=("thor",) if thor else ("orin",),
    )


def _gpu(
    name: str, title: str, capability: str, gib: int, bandwidth: float, tflops: float, unified: bool = False
) -> Target:
    return Target(
        name=name,
        title=title,
        capability=capability,
        memory_bytes=gib * GIB,
        unified=unified,
        bandwidth=bandwidth * GB,
        fp16_flops=tflops * 1e12,
        precisions=precisions_of(capability),
        name_parts=("gb10",) if unified else (title.split()[-1].lower(),),
        int8_factor=4.0 if title.startswith("GeForce") else 2.0,
    )


#: every machine by name. Bandwidth in GB/s and dense FP16 TFLOPS.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        # Jetson module data sheets, "Super" power modes of JetPack 6.2 for Orin Nano and NX
        _jetson("jetson-orin-nano-8gb", "Jetson Orin Nano 8GB", 8, 102.4, 17),
        _jetson("jetson-orin-nx-8gb", "Jetson Orin NX 8GB", 8, 102.4, 19),
        _jetson("jetson-orin-nx-16gb", "Jetson Orin NX 16GB", 16, 102.4, 19),
        _jetson("jetson-agx-orin-32gb", "Jetson AGX Orin 32GB", 32, 204.8, 27, jetpacks=_AGX_ORIN),
        _jetson("jetson-agx-orin-64gb", "Jetson AGX Orin 64GB", 64, 204.8, 42.5, measured=153, jetpacks=_AGX_ORIN),
        _jetson("jetson-agx-thor", "Jetson AGX Thor (T5000)", 128, 273, 258, measured=257, jetpacks=_THOR),
        # GeForce specifications; architecture white papers of Turing, Ampere GA102, Ada and Blackwell for the rates
        _gpu("rtx-2080", "GeForce RTX 2080", "7.5", 8, 448, 40.3),
        _gpu("rtx-3090", "GeForce RTX 3090", "8.6", 24, 936, 71),
        _gpu("rtx-4090", "GeForce RTX 4090", "8.9", 24, 1008, 165.2),
        _gpu("rtx-5090", "GeForce RTX 5090", "12.0", 32, 1792, 209.5),
        # data sheets of the data-centre GPUs
        _gpu("l4", "NVIDIA L4", "8.9", 24, 300, 121),
        _gpu("a10", "NVIDIA A10", "8.6", 24, 600, 125),
        _gpu("a100", "NVIDIA A100", "8.0", 80, 2039, 312),
        _gpu("h100", "NVIDIA H100", "9.0", 80, 3350, 989),
        _gpu("h200", "NVIDIA H200", "9.0", 141, 4800, 989),
        # DGX Spark: 1 PFLOPS of sparse FP4 is an eighth of that in dense FP16
        _gpu("dgx-spark", "DGX Spark (GB10)", "12.1", 128, 273, 125, unified=True),
    )
}


def nearest_rtx_capability(capability: str) -> str:
    """The capability that stands in for another one in tensorrt-rtx: the newest that is not newer than it."""
    number = _number(capability)
    older = [known for known in RTX_CAPABILITIES if _number(known) <= number]
    return max(older, key=_number) if older else RTX_CAPABILITIES[0]


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
