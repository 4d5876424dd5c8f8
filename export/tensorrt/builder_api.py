"""One interface to the TensorRT and TensorRT-RTX builders: the only place that knows how they differ.

Both have the same Python API under two module names, and both have changed it: features were added (weights given by
address in 10.13, attention in 10.14, the KV cache in 10.15) and removed (weak typing in 11). Features are detected by
attributes rather than by version, so that releases newer than this code are handled correctly.
tests/data/trt_attributes.json holds what real releases offer (scripts/tensorrt_contract.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omniport.runtime.backends.tensorrt.packages import import_builder
from omniport.runtime.backends.tensorrt.runtime_api import listen
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import BackendError
from omniport.runtime.system import host

#: operator -> first TensorRT whose ONNX parser takes it. Source: release notes of 10.14 and 10.15.
NATIVE_SINCE: Mapping[str, tuple[int, int]] = {
    "Attention": (10, 14),
    "RotaryEmbedding": (10, 15),
    "RMSNormalization": (10, 15),
    "TensorScatter": (10, 15),
}
#: DequantizeLinear of INT8 with block_size, among operators. A page on Dequantize of an early 10.x names blocks for
#: INT4 alone, today's for INT8 as well; when that changed was not found.
INT8_BLOCKS, _INT8_BLOCKS_SINCE = "INT8 in blocks", (10, 16)
INT8_BLOCKS_SINCE = "{}.{}".format(*_INT8_BLOCKS_SINCE)
#: the first ONNX opset with operators that only those parsers know
_NEW_OPSET, _NEW_OPSET_SINCE = 23, (10, 14)

#: classes whose attributes are looked at
_INTERESTING = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "IAttentionInputLayer",
    "IBuilderConfig",
    "INetworkDefinition",
    "IProgressMonitor",
    "IStreamWriter",
    "LayerType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
)

Attributes = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class Features:
    """What a builder package can do.

    Attributes:
        strong_typing_flag: networks are strongly typed only if asked; without it they always are.
        explicit_capability: the compute capability to build for is chosen, and no GPU is needed.
        mapped_weights: the parser takes weights by address.
        streamed_engine: the engine is written piece by piece.
        timing_cache: kernel timings can be kept between builds. TensorRT-RTX times nothing: its calls do nothing.
        native_attention, native_cache: layers of these kinds exist.
        progress: builds report progress and can be cancelled.
        user_allocation: engines can be made to allocate nothing while they run, without which TensorRT-RTX captures
            none of them into a CUDA graph.
    """

    strong_typing_flag: bool
    explicit_capability: bool
    mapped_weights: bool
    streamed_engine: bool
    timing_cache: bool
    native_attention: bool
    native_cache: bool
    progress: bool
    user_allocation: bool


def features_of(builder: str, version: str, attributes: Attributes) -> Features:
    """Read the features off the attributes of a package's classes (a class that is missing has none).

    The version is asked once: TensorRT 11 keeps the flag for strong typing, ignores it and warns of it.
    """
    have = {name: frozenset(names) for name, names in attributes.items()}

    def has(kind: str, *names: str) -> bool:
        return set(names) <= have.get(kind, frozenset())

    return Features(
        strong_typing_flag=has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
        and not (builder == "tensorrt" and host.version_numbers(version) >= (11,)),
        explicit_capability=has("IBuilderConfig", "num_compute_capabilities", "set_compute_capability"),
        mapped_weights=has("OnnxParser", "load_model_proto", "load_initializer", "parse_model_proto"),
        streamed_engine=has("Builder", "build_serialized_network_to_stream") and has("IStreamWriter", "write"),
        timing_cache=builder == "tensorrt" and has("IBuilderConfig", "create_timing_cache", "set_timing_cache"),
        native_attention=has("IAttentionInputLayer", "attention"),
        native_cache=has("LayerType", "KV_CACHE_UPDATE"),
        progress=has("IBuilderConfig", "progress_monitor") and has("IProgressMonitor", "step_complete"),
        user_allocation=builder == "tensorrt-rtx" and has("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
    )


def attributes_of(module: Any) -> dict[str, list[str]]:
    """Public attributes of the classes that `features_of` looks at."""
    return {
        name: [attribute for attribute in dir(getattr(module, name)) if not attribute.startswith("_")]
        for name in _INTERESTING
        if hasattr(module, name)
    }


def too_old_for(operators: Iterable[str], opset: int, tensorrt: str) -> list[str]:
    """What of a graph the ONNX parser of that TensorRT does not take: ``Attention (10.14)``; empty if it takes all."""
    version = host.version_numbers(tensorrt)[:2]
    lacking = [
        f"{name} ({since[0]}.{since[1]})"
        for name, since in (*NATIVE_SINCE.items(), (INT8_BLOCKS, _INT8_BLOCKS_SINCE))
        if name in set(operators) and version < since
    ]
    if opset >= _NEW_OPSET and version < _NEW_OPSET_SINCE and not lacking:
        lacking.append(f"opset {opset} ({_NEW_OPSET_SINCE[0]}.{_NEW_OPSET_SINCE[1]})")
    return lacking


def load_api(builder: str) -> Api:
    """Import a builder's package.

    Raises:
        BackendError: it is not installed or does not import.
    """
    return Api(builder, import_builder(builder))


class PhaseStack:
    """Progress of a build from its nested phases: a step of one phase may be a phase of its own."""

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._best = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, as a part of its parent's current step."""
        self._phases[name] = (parent, 0, steps)

    def step(self, name: str, done: int) -> None:
        """So many steps of a phase are done."""
        parent, _, steps = self._phases.get(name, (None, 0, 0))
        self._phases[name] = (parent, done, steps)

    def finish(self, name: str) -> None:
        """A phase is over, whether or not all its steps were taken."""
        self._phases.pop(name, None)

    def fraction(self) -> float:
        """Share of the whole that is done, 0 to 1; never less than before."""
        roots = [name for name, (parent, _, _) in self._phases.items() if parent not in self._phases]
        now = max((self._share(name) for name in roots), default=0.0)
        self._best = max(self._best, now)
        return self._best

    def _share(self, name: str) -> float:
        _, done, steps = self._phases[name]
        inside = [self._share(child) for child, (parent, _, _) in self._phases.items() if parent == name]
        return min(1.0, (done + max(inside, default=0.0)) / steps) if steps > 0 else 0.0


class Api:
    """A loaded package, with its messages caught."""

    def __init__(self, builder: str, module: Any) -> None:
        self.builder = builder
        self.module = module
        self.version = str(module.__version__)
        self.features = features_of(builder, self.version, attributes_of(module))
        self.logger, self._messages = listen(builder, module)

    def messages(self) -> list[tuple[str, str]]:
        """Warnings and errors since the last call: (severity, text). Empties the list."""
        return self._messages.take()

    def reason(self) -> str:
        """The errors since the last call in one line, for a message."""
        return self._messages.reason()

    def given(self, made: Any, what: str) -> Any:
        """What a call gave. BackendError: nothing."""
        if made is None:
            raise BackendError(f"{self.builder} {self.version} gives no {what}: {self.reason()}")
        return made

    def create_network(self, builder: Any) -> Any:
        """An empty, strongly typed network."""
        flags = 0
        if self.features.strong_typing_flag:
            flags = 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return self.given(builder.create_network(flags), "network")

    def set_capability(self, config: Any, capability: str) -> None:
        """Build for one compute capability. Without the feature a builder builds for the GPU it runs on.

        Raises:
            BackendError: the package does not know the capability.
        """
        if not self.features.explicit_capability:
            return
        kind = self.module.ComputeCapability
        name = "SM" + capability.replace(".", "")
        if not hasattr(kind, name):
            known = ", ".join(sorted(member for member in dir(kind) if member.startswith("SM")))
            raise BackendError(f"{self.builder} {self.version} does not compile for {name}; it knows {known}")
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(kind, name), 0):
            raise BackendError(f"{self.builder} {self.version} does not take {name}: {self.reason()}")

    def require_user_allocation(self, config: Any, graph: str) -> None:
        """Let the engine of a decoder allocate nothing while it runs, where the builder has that.

        Only decoding is captured into CUDA graphs. The vision encoder cannot be built so without a GPU: the builder
        runs out of memory for its largest images (TensorRT-RTX 1.7.1).
        """
        if self.features.user_allocation and graph in PARTS and PARTS[graph].decodes:  # captured into a CUDA graph
            config.set_flag(self.module.BuilderFlag.REQUIRE_USER_ALLOCATION)

    def allow_tf32(self, config: Any, allowed: bool) -> None:
        """Whether float32 products may be rounded to TF32's ten bits, which builders allow unless told otherwise."""
        flag = self.module.BuilderFlag.TF32
        (config.set_flag if allowed else config.clear_flag)(flag)

    def limit_workspace(self, config: Any, nbytes: int) -> None:
        """Let no kernel take more memory than that for itself.

        Raises:
            BackendError: the builder does not take the limit.
        """
        pool = self.module.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, nbytes)
        if config.get_memory_pool_limit(pool) != nbytes:
            raise BackendError(f"{self.builder} takes no workspace limit of {nbytes:,} bytes: {self.reason()}")

    def make_decomposable(self, layer: Any) -> None:
        """Let an attention be split into several kernels where no fused one exists (FP32, for one)."""
        layer.__class__ = self.module.IAttentionInputLayer  # the network hands out layers by their base class
        layer.attention.decomposable = True

    def flag_names(self, graph: str, tf32: bool) -> tuple[str, ...]:
        """Flags that builds of a graph are made with, for the record."""
        flags = {"ATTENTION_DECOMPOSABLE": self.features.native_attention, "TF32": tf32}
        flags["REQUIRE_USER_ALLOCATION"] = self.features.user_allocation and graph in PARTS and PARTS[graph].decodes
        return ("STRONGLY_TYPED", *(name for name, is_set in flags.items() if is_set))

    def progress_monitor(self, step: Callable[[float], bool]) -> Any:
        """An IProgressMonitor that calls ``step`` with the share that is done; the build stops when it gives False."""
        return _make_monitor(self.module, step)

    def stream_writer(self, write: Callable[[Any], int]) -> Any:
        """An IStreamWriter over ``write``, which gives the bytes it took; what it raises is kept as ``error``."""
        return _make_writer(self.module, write)


def _make_monitor(module: Any, step: Callable[[float], bool]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases = PhaseStack()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step_number: int) -> bool:
            self._phases.step(phase_name, step_number + 1)
            return step(self._phases.fraction())

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

    return Monitor()


def _make_writer(module: Any, write: Callable[[Any], int]) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.error: BaseException | None = None

        def write(self, data: Any, *_: Any) -> int:
            try:
                return write(data)
            except BaseException as error:  # noqa: BLE001 - must not fly through C++; the caller raises it
                self.error = error
                return 0

    return Writer()
