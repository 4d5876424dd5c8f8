"""OpenVINO on the CPU.

A graph is compiled from the same ONNX file as elsewhere, in float32 or, where the processor has it, in bfloat16. What
of a bundle OpenVINO cannot load is run by ONNX Runtime, and a RuntimeWarning says so. Each run has an InferRequest of
its own; those of a decoder belong to a KV cache (`kv_cache`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.graph_spec import GraphSpec
from ...errors import BackendError, OmniportError
from ...system import host
from ...system.signal_stack import kept_signal_stack
from ..base import Array, Backend, Graph, KvCache, Loader, LoadingBackend, Outputs, RunHandle
from ..graph_files import check_signature, graph_file
from ..native import keep_in_forks
from .kv_cache import StateCache
from .packages import INSTALL, import_openvino, why_not
from .stateful_decoder import extensions, keep_state

if TYPE_CHECKING:
    from ...bundle.reader import Bundle

_DEVICE = "CPU"
#: with several streams, 2026.4.1 is wrong by 0.1 to 3 times the size of a result
_FLOAT8 = "it has FP8 weights. Quantize with recipe int8, w8 or int4 for a CPU"
#: what OpenVINO begins its messages with: where in its sources it failed
_WHERE = ("Exception from ", "Check '", "FrontEnd API failed", "While validating")


class _Stopped(RuntimeError):
    """A run was stopped; its request is whole."""


class OpenVinoRun(RunHandle):
    """One run of OpenVINO.

    A run that is stopped comes to its end and gives nothing. To cancel its request would be sooner, but then some
    shapes in the CPU plugin's graph are of this run and others of the one before (2026.4.1): runs behind it fail.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self, request: Any) -> None:
        """Run a request; RuntimeError if the run was stopped before or meanwhile."""
        if not self._stopped.is_set():
            request.start_async()
            request.wait()
        if self._stopped.is_set():
            raise _Stopped("the run was stopped")


class OpenVinoGraph(Graph):
    """One compiled graph."""

    def __init__(self, compiled: Any, spec: GraphSpec, module: Any) -> None:
        self.spec = spec
        self._compiled, self._ov, self._cached = compiled, module, spec.cache
        self._inputs = {t.name: np.dtype(t.dtype) for t in spec.inputs if t.name not in self._cached}
        self._outputs = [t.name for t in spec.outputs if t.name not in self._cached.values()]
        self._lock = threading.Lock()
        self._idle: list[Any] = []

    def handle(self) -> OpenVinoRun:
        return OpenVinoRun()

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        """Run once; see ``Graph.run``.

        Raises:
            BackendError: OpenVINO failed, the cache is full, or the run was stopped.
            OmniportError: feeds that do not match the GraphSpec.
        """
        if feeds.keys() != self._inputs.keys():
            raise OmniportError(f"graph {self.spec.name!r} got {sorted(feeds)}; it takes {sorted(self._inputs)}")
        if isinstance(cache, StateCache) != bool(self._cached) or not isinstance(cache, StateCache | None):
            raise OmniportError(f"graph {self.spec.name!r} got {type(cache).__name__} as its cache; use new_cache()")
        handle = handle or OpenVinoRun()
        assert isinstance(handle, OpenVinoRun), "a handle of another backend's graph"
        arrays = self._arrays(feeds)
        if cache is None:
            with self._lock:
                request = self._idle.pop() if self._idle else None
            outputs = self._run(request or self._new_request(), arrays, handle)
        else:
            held, added = int(feeds["write_index"][0]), int(feeds["inputs_embeds"].shape[1])
            if (live := len(feeds["kv_positions"])) != held + added:
                raise OmniportError(f"graph {self.spec.name!r} got {live} kv_positions; {held + added} were expected")
            cache.check_room(held + added)
            cache.rewind(held)
            outputs = self._run(cache.request, arrays, handle, pooled=False)
            cache.grown(held + added)
        return outputs

    def new_cache(self, capacity: int) -> StateCache:
        """A cache for ``capacity`` tokens; memory is taken as it fills.

        Raises:
            BackendError: the graph is not a decoder, or there is not enough memory.
        """
        if not self._cached:
            raise BackendError(f"graph {self.spec.name!r} keeps no KV cache: only thinker and talker do")
        return StateCache(self._new_request(), self.spec, capacity, self._ov)

    def _arrays(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        for name, dtype in self._inputs.items():
            if feeds[name].dtype != dtype:
                raise OmniportError(
                    f"input {name!r} of graph {self.spec.name!r} is {feeds[name].dtype}; {dtype} was expected"
                )
        return {name: np.require(array, requirements=["C", "W"]) for name, array in feeds.items()}

    def _run(self, request: Any, arrays: Mapping[str, Array], handle: OpenVinoRun, pooled: bool = True) -> Outputs:
        with self._failing(f"run graph {self.spec.name!r}"):
            for name, array in arrays.items():
                request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            try:
                handle.run(request)
            except _Stopped:
                self._give_back(request, pooled)
                raise
            outputs = {name: np.array(request.get_tensor(name).data, np.float32) for name in self._outputs}
        self._give_back(request, pooled)  # what failed is not used again
        return outputs

    def _give_back(self, request: Any, pooled: bool) -> None:
        if pooled:
            with self._lock:
                self._idle.append(request)

    def _new_request(self) -> Any:
        with self._failing(f"take memory for graph {self.spec.name!r}"):
            return keep_in_forks(self._compiled.create_infer_request())

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise BackendError(
                f"OpenVINO could not {what}: {_reason(error)}. If it is out of memory, shorten the prompt or "
                "export with a smaller --max-context; 'omniport inspect --verify' checks the bundle"
            ) from error


class OpenVinoBackend(LoadingBackend[Graph]):
    """OpenVINO for one bundle.

    Args:
        threads: threads of one operator; the physical cores this process may use if None.
        compute: dtype in which graphs of float32 values are computed: ``float32`` or ``bfloat16``.

    Raises:
        BackendError: openvino is missing or too old, or the processor does not compute in bfloat16.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, compute: str = "float32") -> None:
        super().__init__("openvino" if compute == "float32" else f"openvino ({compute})")
        self._ov = import_openvino()
        self._bundle = bundle
        self._threads = threads if threads is not None else host.physical_cores()
        self._core = keep_in_forks(self._ov.Core())
        with kept_signal_stack():  # loads the plugin
            self._brain = self._computes_bfloat16()
        self._compute = compute
        if compute == "bfloat16" and not self._brain:
            raise BackendError(
                "this processor does not compute in bfloat16 (AVX512-BF16 or AMX): leave out the choice of bf16"
            )
        self._others: list[Backend] = []

    def at_once(self) -> int:
        """A run for every ``threads`` cores."""
        return max(1, host.physical_cores() // self._threads)

    def close(self) -> None:
        super().close()
        for other in self._others:
            other.close()

    def _load(self, name: str) -> Graph:
        path, spec = graph_file(self._bundle, name)
        try:
            model = (self._decoders() if spec.cache else self._core).read_model(str(path))
            inputs = [_name(port, [tensor.name for tensor in spec.inputs]) for port in model.inputs]
            outputs = [_name(port, [tensor.name for tensor in spec.outputs]) for port in model.outputs]
            check_signature(spec, inputs, outputs)
            if _has_float8(model):
                return self._without(name, f"OpenVINO {self._ov.__version__} computes graph {name!r} wrong: {_FLOAT8}")
            if spec.cache:
                keep_state(model, spec, self._ov)
            compiled = keep_in_forks(self._core.compile_model(model, _DEVICE, self._options(spec)))
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            return self._without(name, f"OpenVINO {self._ov.__version__} cannot load graph {name!r}: {_reason(error)}")
        host.trim_heap()  # converting leaves as much behind as the weights take
        return OpenVinoGraph(compiled, spec, self._ov)

    def _computes_bfloat16(self) -> bool:
        return "BF16" in self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")

    def _decoders(self) -> Any:
        """A core that reads decoders, in which their operators are converted in our way."""
        core = keep_in_forks(self._ov.Core())
        for extension in extensions(self._ov):
            core.add_extension(extension)
        return core

    def _without(self, name: str, problem: str) -> Graph:
        """The graph in ONNX Runtime."""
        from ..onnxruntime.backend import OrtBackend

        try:
            other = OrtBackend(self._bundle.with_graphs((name,)), threads=self._threads)
            graph = other.graph(name)
        except BackendError as error:
            raise BackendError(f"{problem}. Nor can ONNX Runtime: {error}") from error
        self._others.append(other)
        warnings.warn(f"ONNX Runtime runs graph {name!r}: {problem}", RuntimeWarning, stacklevel=4)
        return graph

    def _options(self, spec: GraphSpec) -> dict[str, Any]:
        brain = self._brain and "bfloat16" in (self._compute, spec.compute_dtype)
        runs = self.at_once()
        return {  # no CACHE_DIR: what OpenVINO 2026.4 reads back from it computes wrong values in silence
            "INFERENCE_PRECISION_HINT": "bf16" if brain else "f32",
            # Both would be coarser without being asked to.
            "KV_CACHE_PRECISION": "bf16" if brain else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # Streams compute side by side, and share these threads.
            "NUM_STREAMS": runs,
            "INFERENCE_NUM_THREADS": runs * self._threads,
            # Each graph would pin its threads to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }


def _open(name: str, bundle: Bundle, threads: int | None) -> OpenVinoBackend:
    return OpenVinoBackend(bundle, threads)


def _problems(name: str, packages: Mapping[str, str | None], gpu: bool) -> list[str]:
    if packages["openvino"] is None:
        return [f"openvino is not installed: {INSTALL}"]
    return [problem] if (problem := why_not()) else []


def _open_in(name: str, bundle: Bundle, threads: int | None, compute: str) -> OpenVinoBackend:
    return OpenVinoBackend(bundle, threads, compute)


LOADER = Loader(_open, _problems, _open_in)


def _has_float8(model: Any) -> bool:
    kinds = (output.get_element_type().get_type_name() for node in model.get_ops() for output in node.outputs())
    return any(kind.startswith("f8") for kind in kinds)


def _name(port: Any, known: list[str]) -> str:
    """The name of a model's input or output that the bundle knows; another one if it has none of them."""
    names = sorted(port.names)
    return next((name for name in names if name in known), names[0] if names else "")


def _reason(error: BaseException) -> str:
    """What OpenVINO says, without where it says it from."""
    text = str(error).partition("\nAt:")[0]  # of Python's own, where a conversion failed
    said = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith(_WHERE)]
    return " ".join(said)[:500] or type(error).__name__
