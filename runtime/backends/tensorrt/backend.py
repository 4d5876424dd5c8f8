"""The backend that runs TensorRT and TensorRT-RTX engines.

Only engines that the bundle lists for this machine are loaded: by hash, builder, version and compute capability
(`omniport.runtime.bundle.engines`). Each graph has one stream, and takes one call at a time.

Decoding is captured in CUDA graphs, whose shapes are fixed: `kv_cache` fills the live length up to one of a few, each
with an execution context and a CUDA graph. The first graph is timed against the same call without one, and is used only
if it is faster. A step can be repeated for that: it writes the same row of the cache again.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.engines import Engine, EngineRecord, Profile, build_line, find_engine, verify_engine
from ...bundle.graph_spec import GraphSpec
from ...errors import BackendError, BundleError, OmniportError
from ..base import NO_GPU, Array, Graph, KvCache, Loader, LoadingBackend, Outputs, RunHandle
from .cuda import Driver
from .cuda_driver import CudaDriver
from .execution import Executor, Scratch
from .kernel_cache import KernelFile
from .kv_cache import GrowingTrtCache, StaticTrtCache, TrtCache, positions_bucket
from .packages import why_not
from .runtime_api import EngineRuntime, LoadedEngine, TrtRuntime
from .warming import Warming

if TYPE_CHECKING:
    from ...bundle.reader import Bundle

#: runs that are timed to choose between a CUDA graph and the plain call
_TIMED = 5


@dataclass(frozen=True)
class DecodeTiming:
    """Why decoding launches a CUDA graph, or does not.

    Attributes:
        plain, graph: seconds of one step, the quickest of a few; ``graph`` is None where none could be captured.
        problem: why not.
    """

    plain: float
    graph: float | None
    problem: str = ""

    @property
    def uses_graph(self) -> bool:
        """Whether decoding launches CUDA graphs."""
        return self.graph is not None and self.graph < self.plain


class TrtGraph(Graph):
    """One loaded engine.

    Args:
        kernels: where to keep what the engine compiles while it runs; None to keep nothing.

    Attributes:
        decoding: how decoding runs, once a step has been timed.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        engine: Engine,
        spec: GraphSpec,
        driver: Driver,
        kernels: KernelFile | None = None,
    ) -> None:
        self.spec = spec
        self.decoding: DecodeTiming | None = None
        self._loaded, self._engine, self._driver = loaded, engine, driver
        self._cached = spec.cache
        _check_signature(loaded, engine, spec)
        self._inputs = {t.name: t.dtype for t in spec.inputs if t.name not in self._cached}
        self._outputs = {t.name: t.dtype for t in spec.outputs if t.name not in self._cached.values()}
        self._lock = threading.Lock()
        self._closed = False
        self._stream = driver.create_stream()
        self._scratch = Scratch(driver)
        self._decode_scratch = Scratch(driver)
        self._executors: dict[int, Executor] = {}
        self._caches: weakref.WeakSet[TrtCache] = weakref.WeakSet()
        self._kernels, self._held_kernels = kernels, b""
        if kernels is not None and (held := kernels.read()) and loaded.take_kernels(held):
            self._held_kernels = held
        self._warming: Warming | None = None
        if loaded.compiles and spec.aliases:
            capacity = engine.record.fixed_dims["capacity"]
            lengths = sorted({positions_bucket(live, capacity) for live in range(1, capacity + 1)})
            self._warming = Warming(loaded, spec, driver, lengths, capacity)

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        """Run once; see ``Graph.run``. Calls from several threads wait for one another.

        Raises:
            BackendError: shapes that the engine was not built for, or the driver or engine failed.
            OmniportError: feeds that do not match the GraphSpec.
        """
        _check_feeds(self.spec, self._inputs, feeds)
        if isinstance(cache, TrtCache) != bool(self._cached) or not isinstance(cache, TrtCache | None):
            raise OmniportError(f"graph {self.spec.name!r} got {type(cache).__name__} as its cache; use new_cache()")
        if cache is not None:
            feeds = cache.fill(feeds)
        profile = self._profile_for(feeds)
        with self._lock:
            if self._closed:
                raise BackendError(f"graph {self.spec.name!r} is closed; open the session again")
            if profile not in self._executors:
                self._executors[profile] = self._new_executor(fixed=False, profile=profile)
            try:
                if cache is None:
                    return self._executors[profile].run(feeds)
                return self._run_cached(feeds, cache, self._executors[profile])
            except BaseException:
                self._drain()
                raise

    def new_cache(self, capacity: int) -> TrtCache:
        """A cache for ``capacity`` tokens at least: engines with a static cache have one size.

        Raises:
            BackendError: the graph is not a decoder, the engine was built for fewer, or there is not enough memory.
        """
        if not self._cached:
            raise BackendError(f"graph {self.spec.name!r} keeps no KV cache: only thinker and talker do")
        built = _built_for(self._engine.record) or 0
        if capacity > built:
            raise BackendError(
                f"a KV cache of {capacity} tokens was asked for, and {self._engine.name} was built for {built}: open "
                f"the session with max_context={built}, or build with more: {self._build_line()} --max-context "
                f"{capacity}"
            )
        if not self.spec.aliases:
            return self._kept(GrowingTrtCache(self._driver, self._stream, self.spec, capacity))
        return self._kept(StaticTrtCache(self._driver, self._stream, self.spec, built))

    def close(self) -> None:
        """Give back everything, caches as well, once the call that is under way has ended."""
        if self._warming is not None:
            self._warming.stop()
            self._warming = None
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._keep_kernels()
            for cache in self._caches:
                cache.release()
            for executor in self._executors.values():
                executor.release()
            self._executors.clear()
            self._scratch.release()
            self._decode_scratch.release()
            del self._loaded
            self._driver.destroy_stream(self._stream)

    def _kept(self, cache: TrtCache) -> TrtCache:
        self._caches.add(cache)
        return cache

    def _drain(self) -> None:
        """Let what a failed call has put into the stream end: it uses memory that may go with what is dropped now."""
        with suppress(BackendError):
            self._driver.synchronize(self._stream)

    def _keep_kernels(self) -> None:
        if self._kernels is not None and self._executors:
            made = self._loaded.kernels()
            if made != self._held_kernels:
                self._kernels.write(made)

    def _run_cached(self, feeds: Mapping[str, Array], cache: TrtCache, executor: Executor) -> Outputs:
        held, added = int(feeds["write_index"][0]), int(feeds["inputs_embeds"].shape[1])
        if added == 1 and (self.decoding is None or self.decoding.uses_graph):
            return self._decode(feeds, cache, held)
        cache.bind(executor, held, added, len(feeds["kv_positions"]))
        outputs = executor.run(feeds)
        cache.grown(held, added)
        return outputs

    def _decode(self, feeds: Mapping[str, Array], cache: TrtCache, held: int) -> Outputs:
        """One step, by a CUDA graph if that turns out to be quicker."""
        bucket = len(feeds["kv_positions"])
        executor = cache.executors.get(bucket)
        made = executor is None
        if executor is None:
            executor = self._new_executor(fixed=True)
        cache.bind(executor, held, 1, bucket)
        outputs = executor.run(feeds)
        if made:  # a first run may allocate, which cannot be captured
            problem = _capture(executor)
            if self.decoding is None:
                self.decoding = self._timing(executor, problem)
            if self.decoding.uses_graph:
                cache.executors[bucket] = executor
        cache.grown(held, 1)
        return outputs

    def _timing(self, executor: Executor, problem: str) -> DecodeTiming:
        """Time a step that has run; ``problem``: why there is no graph of it."""
        plain = _quickest(executor, captured=False)
        if problem:
            return DecodeTiming(plain, None, problem)
        try:
            return DecodeTiming(plain, _quickest(executor, captured=True))
        except BackendError as error:
            self._drain()
            return DecodeTiming(plain, None, str(error))

    def _new_executor(self, fixed: bool, profile: int = 0) -> Executor:
        scratch = self._decode_scratch if fixed else self._scratch
        context = self._loaded.context(fixed)
        if profile:
            context.use_profile(profile, self._stream)
            self._driver.synchronize(self._stream)
        return Executor(self._driver, self._stream, context, self._inputs, self._outputs, scratch)

    def _profile_for(self, feeds: Mapping[str, Array]) -> int:
        """The first of the engine's profiles that takes these shapes.

        Raises:
            BackendError: none does.
        """
        profiles = self._engine.record.profiles
        misfit = ""
        for index, profile in enumerate(profiles):
            misfit = _misfit(profile, feeds)
            if not misfit:
                return index
        raise BackendError(
            f"input {misfit!r} of graph {self.spec.name!r} is {list(feeds[misfit].shape)}; {self._engine.name} was "
            f"built for {list(profiles[-1].inputs[misfit].min)} to {list(profiles[-1].inputs[misfit].max)}. Send less, "
            f"or build it for more: {self._build_line()} (omniport build --help lists the limits)"
        )

    def _build_line(self) -> str:
        record = self._engine.record
        return build_line(self._engine.bundle, record.target, record.builder, (record.graph,))


class TrtBackend(LoadingBackend[TrtGraph]):
    """The engines of one bundle that this machine can run.

    Args:
        builder: ``tensorrt`` or ``tensorrt-rtx``.
        runtime, driver: what loads and what runs them; TensorRT and CUDA by default.

    Attributes:
        engines: by graph.
        missing: graphs of the bundle without an engine, and why.

    Raises:
        BackendError: TensorRT or a GPU is missing, or no graph has an engine for this machine.
        BundleError: the list of engines cannot be trusted.
    """

    def __init__(
        self, bundle: Bundle, builder: str, *, runtime: EngineRuntime | None = None, driver: Driver | None = None
    ) -> None:
        super().__init__(builder)
        self.engines: dict[str, Engine] = {}
        self.missing: dict[str, str] = {}
        self._bundle = bundle
        self._runtime = runtime or TrtRuntime(builder)
        self._driver = driver or CudaDriver()
        capability = self._driver.capability()
        for name in bundle.manifest.graphs:
            try:
                self.engines[name] = find_engine(
                    bundle, name, builder=builder, version=self._runtime.version, capability=capability
                )
            except BackendError as error:
                self.missing[name] = str(error)
        if not self.engines:
            raise BackendError(
                f"{bundle.root} has no engine for {builder} {self._runtime.version} on compute capability "
                f"{capability}. Build them on this machine: {build_line(bundle.root, 'this', builder)}"
                f" ({next(iter(self.missing.values()), 'it has no graphs')})"
            )

    def max_context(self) -> int | None:
        """Most tokens that the engines' KV caches hold; None if they do not say."""
        sizes = [_built_for(engine.record) for engine in self.engines.values()]
        return min((size for size in sizes if size is not None), default=None)

    def _load(self, name: str) -> TrtGraph:
        if name in self.missing:
            raise BackendError(self.missing[name])
        if name not in self.engines:
            known = ", ".join(self._bundle.manifest.graphs)
            raise BackendError(f"{self._bundle.root} has no graph {name!r}; it has {known}. Export it again with it")
        engine = self.engines[name]
        verify_engine(engine)
        loaded = self._runtime.load(engine.path)
        kernels = KernelFile.of(engine, self._runtime.version, self._driver.device_name())
        return TrtGraph(loaded, engine, self._bundle.manifest.graphs[name], self._driver, kernels)

    def _unload(self, graph: TrtGraph) -> None:
        graph.close()


def _open(name: str, bundle: Bundle, threads: int | None) -> TrtBackend:
    return TrtBackend(bundle, name)


def _problems(name: str, packages: Mapping[str, str | None], gpu: bool) -> list[str]:
    problems = [problem] if (problem := why_not(name)) else []
    return problems if gpu else [*problems, NO_GPU]


LOADER = Loader(_open, _problems)


def _built_for(record: EngineRecord) -> int | None:
    """Tokens that a decoder's engine takes in its KV cache."""
    past = record.profiles[-1].dims.get("past")
    return record.fixed_dims.get("capacity") if past is None else past.max + 1


def _misfit(profile: Profile, feeds: Mapping[str, Array]) -> str:
    """The first input whose shape is outside the profile; empty if there is none."""
    for name, array in feeds.items():
        span = profile.inputs.get(name)
        if span is None:
            continue
        fits = len(array.shape) == len(span.min)
        if not fits or not all(a <= n <= b for a, n, b in zip(span.min, array.shape, span.max, strict=True)):
            return name
    return ""


def _capture(executor: Executor) -> str:
    """Capture an executor that has run; gives why it cannot be, empty if it is."""
    if not executor.capturable():
        return "the engine cannot be captured: it allocates while it runs"
    try:
        executor.capture()
    except BackendError as error:
        return str(error)
    return ""


def _quickest(executor: Executor, captured: bool) -> float:
    seconds = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        executor.execute(captured)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _check_feeds(spec: GraphSpec, inputs: Mapping[str, str], feeds: Mapping[str, Array]) -> None:
    if feeds.keys() != inputs.keys():
        raise OmniportError(f"graph {spec.name!r} got {sorted(feeds)}; it takes {sorted(inputs)}")
    for name, dtype in inputs.items():
        wanted = "float32" if dtype in ("float16", "bfloat16") else dtype
        if feeds[name].dtype != np.dtype(wanted):
            raise OmniportError(f"input {name!r} of graph {spec.name!r} is {feeds[name].dtype}; {wanted} was expected")


def _check_signature(loaded: LoadedEngine, engine: Engine, spec: GraphSpec) -> None:
    """The engine's tensors are those of the GraphSpec, and its cache is one buffer on both sides."""
    wanted = {(t.name, t.dtype, True) for t in spec.inputs} | {(t.name, t.dtype, False) for t in spec.outputs}
    found = {(t.name, t.dtype, t.is_input) for t in loaded.tensors.values()}
    again = f"{build_line(engine.bundle, engine.record.target, engine.record.builder, (spec.name,))} --force"
    if found != wanted:
        differ = ", ".join(f"{name} ({dtype})" for name, dtype, _ in sorted(found ^ wanted))
        raise BundleError(
            f"{engine.name} does not have the inputs and outputs of graph {spec.name!r} ({differ} differ). Build it "
            f"again: {again}"
        )
    for output, source in spec.aliases.items():
        if (shared := loaded.aliased_input(output)) not in (source, None):
            raise BundleError(
                f"{engine.name} writes {output!r} over {shared!r}; {source!r} was expected. Build it again: {again}"
            )
