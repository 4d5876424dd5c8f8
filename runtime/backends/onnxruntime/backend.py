"""ONNX Runtime on the CPU or an NVIDIA GPU, with a static KV cache updated in place.

A decoder's ``past_*`` input and ``present_*`` output are bound to the very same OrtValue, so TensorScatter writes the
new rows where the cache lies. If ONNX Runtime cannot do that it copies the whole cache every step and logs the warning
``in-place optimization not activated``; warnings therefore stay on.

A concat KV cache is what the last call returned: `omniport.runtime.backends.onnxruntime.kv_cache`.

On a GPU the cache stays on the device. What else a graph takes and gives is made or read on the host at every step, so
it crosses in any case: 8 KB in and one row of logits out for a token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle.graph_spec import GraphSpec
from ...errors import BackendError, OmniportError
from ...system import host
from ...system.host import physical_cores
from ..base import NO_GPU, Array, Graph, KvCache, Loader, LoadingBackend, Outputs, RunHandle
from ..graph_files import check_signature, graph_file
from ..native import keep_in_forks
from .cuda_provider import cuda_options, why_no_cuda
from .kv_cache import GrowingCache, OrtCache, StaticCache
from .packages import import_onnxruntime, install_line, mend_line
from .providers import (
    INSTALL_PLUGIN,
    PLUGIN,
    PROVIDERS,
    host_nodes,
    plugin_devices,
    record_placement,
    warn_of_host_nodes,
)

if TYPE_CHECKING:
    from ...bundle.reader import Bundle

#: the first opset whose operators (Attention, RotaryEmbedding, TensorScatter) need `MIN_NATIVE` of ONNX Runtime
NATIVE_OPSET = 23
MIN_NATIVE = (1, 28)
NO_NATIVE_ON_310 = (
    "There is none for Python 3.10: use Python 3.11 or newer, TensorRT engines, or a bundle made by "
    "'omniport export --ops decomposed --kv concat'"
)
_WARNING = 2


class OrtRun(RunHandle):
    """One run of ONNX Runtime."""

    def __init__(self, module: Any) -> None:
        self.options = module.RunOptions()

    def stop(self) -> None:
        self.options.terminate = True


class OrtGraph(Graph):
    """One InferenceSession."""

    def __init__(self, session: Any, spec: GraphSpec, device: str, module: Any) -> None:
        self._session = keep_in_forks(session)
        self._ort = module
        self._device = device
        self.spec = spec
        self._cached = spec.cache
        self._inputs = {t.name: np.dtype(t.dtype) for t in spec.inputs if t.name not in self._cached}
        self._outputs = [t.name for t in spec.outputs if t.name not in self._cached.values()]

    def handle(self) -> OrtRun:
        return OrtRun(self._ort)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        """Run once; see ``Graph.run``.

        Raises:
            BackendError: ONNX Runtime failed, ran out of memory, or was stopped.
            OmniportError: feeds that do not match the GraphSpec.
        """
        if feeds.keys() != self._inputs.keys():
            raise OmniportError(f"graph {self.spec.name!r} got {sorted(feeds)}; it takes {sorted(self._inputs)}")
        assert handle is None or isinstance(handle, OrtRun), "a handle of another backend's graph"
        binding = self._binding(feeds, cache)
        held = []  # ONNX Runtime reads these buffers during the run
        for name, dtype in self._inputs.items():
            array = np.ascontiguousarray(feeds[name])
            if array.dtype != dtype:
                raise OmniportError(
                    f"input {name!r} of graph {self.spec.name!r} is {array.dtype}; {dtype} was expected"
                )
            held.append(array)
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        with self._failing(f"run graph {self.spec.name!r}"):
            self._session.run_with_iobinding(binding, None if handle is None else handle.options)
        outputs = dict(zip(self._bound_outputs(cache), binding.get_outputs(), strict=True))
        if isinstance(cache, OrtCache):
            cache.take(outputs)
        return {name: np.array(outputs[name].numpy(), np.float32) for name in self._outputs}

    def new_cache(self, capacity: int) -> OrtCache:
        """A cache for ``capacity`` tokens.

        Raises:
            BackendError: the graph is not a decoder, or there is not enough memory.
        """
        if not self._cached:
            raise BackendError(f"graph {self.spec.name!r} keeps no KV cache: only thinker and talker do")
        kind = GrowingCache if self.spec.grows else StaticCache
        with self._failing(f"allocate the KV cache of {self.spec.name!r} for {capacity} tokens"):
            return kind(self._session, self.spec, capacity, self._device, self._ort)

    def _binding(self, feeds: Mapping[str, Array], cache: KvCache | None) -> Any:
        if isinstance(cache, OrtCache):
            with self._failing(f"bind the KV cache of {self.spec.name!r}"):
                return cache.bind(int(feeds["write_index"][0]))
        if cache is None and not self._cached:
            return self._session.io_binding()
        raise OmniportError(f"graph {self.spec.name!r} got {type(cache).__name__} as its cache; use new_cache()")

    def _bound_outputs(self, cache: KvCache | None) -> list[str]:
        """Output names in the order in which they were first bound."""
        return ([] if cache is None else list(self._cached.values())) + self._outputs

    def end_profile(self) -> Path:
        """The profile of every run so far; the backend was opened with ``profiles``, and nothing runs afterwards."""
        return Path(self._session.end_profiling())

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except _ort_errors(self._ort) as error:
            raise BackendError(
                f"ONNX Runtime could not {what}: {_first_line(error)}. If it is out of memory, shorten the prompt or "
                "export with a smaller --max-context; 'omniport inspect --verify' checks the bundle"
            ) from error


class OrtBackend(LoadingBackend[OrtGraph]):
    """ONNX Runtime for one bundle.

    Args:
        device: ``cpu``, ``cuda``, or ``tensorrt-rtx`` (a plugin of ONNX Runtime).
        threads: threads of one operator; the physical cores this process may use if None.
        profiles: folder in which every graph keeps a profile of its runs; none are kept if None.

    Attributes:
        host_nodes: (operator, name) of nodes that a GPU has no kernel for, by loaded graph.

    Raises:
        BackendError: onnxruntime or its CUDA provider is missing, or the bundle's precision does not run there.
    """

    def __init__(
        self, bundle: Bundle, device: str = "cpu", threads: int | None = None, profiles: Path | None = None
    ) -> None:
        super().__init__(f"ort-{device}")
        self._ort = import_onnxruntime()
        self._profiles = profiles
        self._bundle = bundle
        self._device = device
        self._threads = threads if threads is not None else physical_cores()
        self.host_nodes: dict[str, tuple[tuple[str, str], ...]] = {}
        self._plugin = plugin_devices(self._ort) if device == "tensorrt-rtx" else []
        if device == "cuda" and (reason := why_no_cuda(self._ort)):
            raise BackendError(f"{reason}; or use backend 'ort-cpu'")
        if device == "cpu":
            for spec in bundle.manifest.graphs.values():
                _refuse_bfloat16(spec)

    def at_once(self) -> int | None:
        """On the CPU, a run for every ``threads`` cores."""
        return max(1, physical_cores() // self._threads) if self._device == "cpu" else None

    def _load(self, name: str) -> OrtGraph:
        path, spec = graph_file(self._bundle, name)
        _check_version(self._ort.__version__, spec)
        try:
            session = self._session(path, spec)
        except _ort_errors(self._ort) as error:
            raise BackendError(
                f"ONNX Runtime {self._ort.__version__} cannot load graph {name!r} ({path}): {_first_line(error)}. "
                "Check the bundle with 'omniport inspect --verify'"
            ) from error
        if PROVIDERS[self._device] not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime cannot use {PROVIDERS[self._device]} here (driver or CUDA libraries missing): "
                "run 'omniport doctor', or use backend 'ort-cpu'"
            )
        check_signature(spec, [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
        if self._device == "cpu":
            host.trim_heap()  # packing integer weights frees a third of what it keeps
        else:
            self.host_nodes[name] = host_nodes(session)
            warn_of_host_nodes(name, PROVIDERS[self._device], self.host_nodes[name])
        return OrtGraph(session, spec, self._device, self._ort)

    def _session(self, path: Path, spec: GraphSpec) -> Any:
        options = self._options()
        if self._plugin:
            options.add_provider_for_devices(self._plugin, {})
            return self._ort.InferenceSession(str(path), options)
        providers: list[Any] = [PROVIDERS["cpu"]]
        if self._device == "cuda":
            providers.insert(0, (PROVIDERS["cuda"], cuda_options(spec)))
        # falling back to the CPU would be printed to stdout, and is refused below in any case
        return self._ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self._threads
        options.log_severity_level = _WARNING
        # A pattern is a second block, as large as all that a call needs, from the second call of a shape on.
        options.enable_mem_pattern = False
        # Six graphs run one after the other: threads of one must not spin while another computes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._device != "cpu":
            record_placement(options)
        if self._profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profiles / "run")
        return options


def _open(name: str, bundle: Bundle, threads: int | None) -> OrtBackend:
    return OrtBackend(bundle, device=name.removeprefix("ort-"), threads=threads)


def _problems(name: str, packages: Mapping[str, str | None], gpu: bool) -> list[str]:
    problems = []
    if packages["onnxruntime"] is None:
        problems.append(f"onnxruntime is not installed: {install_line()}")
    else:
        try:
            module = import_onnxruntime()
        except BackendError as error:
            problems.append(str(error))
        else:
            version = str(module.__version__)
            if sys.version_info >= (3, 11) and host.version_numbers(version) < MIN_NATIVE:
                problems.append(f"onnxruntime {version} is too old: {mend_line()}")
            if name == "ort-cuda" and (reason := why_no_cuda(module)):
                problems.append(reason)
    if name == "ort-tensorrt-rtx" and packages[PLUGIN] is None:
        problems.append(f"onnxruntime-ep-nv-tensorrt-rtx is not installed: {INSTALL_PLUGIN}")
    return problems if gpu or name == "ort-cpu" else [*problems, NO_GPU]


LOADER = Loader(_open, _problems)


def _check_version(version: str, spec: GraphSpec) -> None:
    """Refuse native graphs where ONNX Runtime lacks their operators or, as 1.25 to 1.27 do, computes them wrong."""
    if spec.opset < NATIVE_OPSET or host.version_numbers(version) >= MIN_NATIVE:
        return
    newer = ".".join(map(str, MIN_NATIVE))
    raise BackendError(
        f"onnxruntime {version} cannot run graph {spec.name!r}: opset {spec.opset} needs {newer} or newer. "
        + (NO_NATIVE_ON_310 if sys.version_info < (3, 11) else f"pip install -U 'onnxruntime>={newer}'")
    )


def _ort_errors(module: Any) -> tuple[type[BaseException], ...]:
    """What onnxruntime raises: its classes derive from Exception and have no common base."""
    state = vars(module.capi.onnxruntime_pybind11_state).values()
    own = [value for value in state if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _refuse_bfloat16(spec: GraphSpec) -> None:
    tensors = {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    if spec.compute_dtype == "bfloat16" or "bfloat16" in tensors:
        raise BackendError(
            f"graph {spec.name!r} is bfloat16, for which ONNX Runtime has no CPU kernels: export with --precision fp32 "
            "(or fp16) for the CPU, or run this bundle on a GPU"
        )
