"""A stand-in for a GPU and for TensorRT's runtime, to test the host code around them. It is no engine.

`FakeDriver` keeps "device memory" as numpy arrays under addresses of its own. What is put into a stream is carried out
when the stream is waited for, not before, so code that reads too early, or changes what a copy has yet to read, gives
wrong results here as on a GPU. New memory is full of ones bits: NaN, -1 and True.

`FakeRuntime` loads files that are no engines, and runs the bundle's ONNX graph in ONNX Runtime instead. So a reply over
it proves buffers, aliasing, dtypes, shapes, captures and errors of the host code, and nothing about any engine.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from omniport.export.tensorrt.engine_store import EngineStore
from omniport.export.tensorrt.profiles import Limits, fixed_dims, graph_dims, make_profiles
from omniport.runtime.backends.tensorrt.runtime_api import EngineTensor
from omniport.runtime.bundle.engines import EngineRecord, Profile, engine_path, graph_files, list_engines
from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec
from omniport.runtime.bundle.listed_files import file_record
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError

VERSION, CAPABILITY, BUILDER = "1.7.1.116", "8.9", "tensorrt-rtx"
_HELD = {"bfloat16": "uint16"}


class FakeDriver:
    """See the module.

    Attributes:
        done: names of what was carried out, in order.
        name: the device's.
        room: bytes that can still be allocated.
        refuse_capture: message with which captures fail.
        refuse_after: captures that are made before that.
        launch_cost, put_cost: seconds for a launch of a captured graph, and for everything put into a stream by itself.
    """

    def __init__(self, room: int = 1 << 40) -> None:
        self.done: list[str] = []
        self.name = "Stand-in 4090"
        self.room = room
        self.refuse_capture = ""
        self.refuse_after = 0
        self.launch_cost = self.put_cost = 0.0
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.host: dict[int, NDArray[np.uint8]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._capturing: dict[int, list[Callable[[], None]]] = {}
        self._next = 0x7000_0000_0000
        self._handles = itertools.count(1)
        self._lock = threading.RLock()  # a finalizer may free while this thread allocates

    def capability(self) -> str:
        return CAPABILITY

    def device_name(self) -> str:
        return self.name

    def allocate(self, nbytes: int) -> int:
        with self._lock:
            if nbytes > self.room:
                raise BackendError(f"the GPU has no room for {nbytes:,} bytes more")
            self.room -= nbytes
            address = self._next
            self._next += (nbytes // 256 + 2) * 256  # never beside each other: to write past an end is an error
            self.memory[address] = np.full(nbytes, 0xFF, np.uint8)
            return address

    def free(self, address: int) -> None:
        with self._lock:
            self.room += len(self.memory.pop(address))

    def allocate_host(self, nbytes: int) -> int:
        memory = np.full(nbytes, 0xFF, np.uint8)
        self.host[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free_host(self, address: int) -> None:
        del self.host[address]

    def to_device(self, device: int, host: int, nbytes: int, stream: int) -> None:
        source, to = self.view(self.host, host, nbytes), self.view(self.memory, device, nbytes)
        self.put(stream, "to_device", lambda: np.copyto(to, source))

    def to_host(self, host: int, device: int, nbytes: int, stream: int) -> None:
        to, source = self.view(self.host, host, nbytes), self.view(self.memory, device, nbytes)
        self.put(stream, "to_host", lambda: np.copyto(to, source))

    def copy_rows(self, to: int, source: int, stream: int, *, to_pitch: int, pitch: int, width: int, rows: int) -> None:
        pairs = [
            (self.view(self.memory, to + i * to_pitch, width), self.view(self.memory, source + i * pitch, width))
            for i in range(rows)
        ]
        self.put(stream, "copy_rows", lambda: [np.copyto(a, b) for a, b in pairs])

    def zero(self, device: int, nbytes: int, stream: int) -> None:
        memory = self.view(self.memory, device, nbytes)
        self.put(stream, "zero", lambda: memory.fill(0))

    def create_stream(self) -> int:
        handle = next(self._handles)
        self.streams[handle] = []
        return handle

    def destroy_stream(self, stream: int) -> None:
        del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        assert stream not in self._capturing, "a stream that is captured cannot be waited for"
        queue, self.streams[stream] = self.streams[stream], []
        for operation in queue:
            operation()

    def capture(self, stream: int, body: Callable[[], None]) -> int:
        self._capturing[stream] = []
        try:
            body()
            if self.refuse_capture and len(self.graphs) >= self.refuse_after:
                raise BackendError(self.refuse_capture)
        finally:
            captured = self._capturing.pop(stream)
        handle = next(self._handles)
        self.graphs[handle] = captured
        return handle

    def launch(self, graph: int, stream: int) -> None:
        time.sleep(self.launch_cost)
        self.streams[stream] += [lambda: self.done.append("launch"), *self.graphs[graph]]

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def put(self, stream: int, name: str, operation: Callable[[], object]) -> None:
        """Add to a stream, or to what is captured of it."""

        def carry_out() -> None:
            self.done.append(name)
            operation()

        if stream in self._capturing:
            self._capturing[stream].append(carry_out)
        else:
            time.sleep(self.put_cost)
            self.streams[stream].append(carry_out)

    @staticmethod
    def view(memory: Mapping[int, NDArray[np.uint8]], address: int, nbytes: int) -> NDArray[np.uint8]:
        """That many bytes, which have to lie inside one allocation."""
        for start, held in tuple(memory.items()):  # other threads allocate meanwhile
            if start <= address < start + max(1, len(held)):
                assert address + nbytes <= start + len(held), f"{nbytes} bytes at {address:#x} pass the end"
                return held[address - start : address - start + nbytes]
        raise AssertionError(f"{address:#x} is no allocated address")


class FakeRuntime:
    """Loads stand-ins for the engines of a bundle.

    Args:
        capturable: what contexts say of themselves.
        compiles: engines compile a kernel for each shape that they meet.
    """

    builder = BUILDER
    models: Bundle | None = None
    """whose ONNX graphs to run, if not the bundle's own"""

    def __init__(
        self,
        bundle: Bundle,
        driver: FakeDriver,
        version: str = VERSION,
        capturable: bool = True,
        compiles: bool = False,
    ) -> None:
        self.version = version
        self.capturable = capturable
        self.compiles = compiles
        self.compiled: list[str] = []
        self.refused: list[bytes] = []
        self.loaded: list[str] = []
        self.contexts: list[FakeContext] = []
        self.bundle, self.driver = bundle, driver

    def load(self, path: Path) -> FakeEngine:
        assert path.read_bytes() == stand_in(path.stem), "only what was written as an engine is loaded"
        self.loaded.append(path.stem)
        record = next(e.record for e in list_engines(self.bundle).usable if e.path == path)
        return FakeEngine(self, self.bundle.manifest.graphs[path.stem], record.profiles)


class FakeEngine:
    """The ONNX graph of one spec in ONNX Runtime."""

    def __init__(self, runtime: FakeRuntime, spec: GraphSpec, profiles: Sequence[Profile]) -> None:
        self.runtime, self.spec, self.profiles = runtime, spec, profiles
        self.known: set[str] = set()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        models = runtime.models or runtime.bundle
        path = str(models.path(models.manifest.graphs[spec.name].file))
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        sides = ((spec.inputs, True), (spec.outputs, False))
        self.tensors = {
            t.name: EngineTensor(t.name, t.dtype, tuple(d if isinstance(d, int) else -1 for d in t.shape), inward)
            for side, inward in sides
            for t in side
        }

    @property
    def compiles(self) -> bool:
        return self.runtime.compiles

    def aliased_input(self, output: str) -> str | None:
        return self.spec.aliases.get(output)

    def take_kernels(self, kernels: bytes) -> bool:
        assert all(made.engine is not self for made in self.runtime.contexts), "kernels come before contexts"
        head, *names = kernels.decode().split("\n")
        if head != f"kernels {self.runtime.version}":
            self.runtime.refused.append(kernels)
            return False
        self.known.update(names)
        return True

    def kernels(self) -> bytes:
        if not self.runtime.compiles:
            return b""
        return "\n".join([f"kernels {self.runtime.version}", *sorted(self.known)]).encode()

    def compile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        name = f"{self.spec.name} {sorted(shapes.items())}"
        if name not in self.known:
            self.known.add(name)
            self.runtime.compiled.append(name)

    def context(self, fixed: bool) -> FakeContext:
        made = FakeContext(self, fixed)
        self.runtime.contexts.append(made)
        return made


class FakeContext:
    """One context; checks what TensorRT would check or silently get wrong."""

    def __init__(self, engine: FakeEngine, fixed: bool) -> None:
        self.engine, self.fixed = engine, fixed
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.calls = self.profile = 0

    def use_profile(self, index: int, stream: int) -> None:
        assert not self.shapes, "shapes belong to the profile that was used when they were set"
        self.engine.runtime.driver.put(stream, "profile", lambda: None)
        self.profile = index

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        spans = self.engine.profiles[self.profile].inputs.get(name)
        assert spans is None or all(a <= n <= b for a, n, b in zip(spans.min, shape, spans.max, strict=True)), name
        assert len(shape) == len(self.engine.spec.input(name).shape)
        self.shapes[name] = shape

    def shape(self, name: str) -> tuple[int, ...]:
        dims = self._dims()
        return self.engine.spec.output(name).sized(dims, "min")

    def scratch_bytes(self) -> int:
        return 64 * max(self._dims().get("new_tokens", DimRange(1, 1, 1)).min, 1)

    def set_address(self, name: str, address: int) -> None:
        assert name in self.engine.tensors
        self.addresses[name] = address

    def set_scratch(self, address: int, nbytes: int) -> None:
        self.scratch = (address, nbytes)

    def capturable(self, stream: int) -> bool:
        return self.engine.runtime.capturable

    def enqueue(self, stream: int) -> None:
        assert self.addresses.keys() == self.engine.tensors.keys(), "a tensor without an address"
        assert self.scratch[1] >= self.scratch_bytes(), "too little scratch memory"
        driver, spec = self.engine.runtime.driver, self.engine.spec
        for output, source in spec.aliases.items():
            assert self.addresses[output] == self.addresses[source], f"{output} does not share {source}'s buffer"
        scratch = driver.view(driver.memory, *self.scratch)
        inputs = {t.name: self._memory(t.name, t.dtype, self.shapes[t.name]) for t in spec.inputs}
        outputs = {t.name: self._memory(t.name, t.dtype, self.shape(t.name)) for t in spec.outputs}
        self.calls += 1
        self.engine.compile(self.shapes)

        def run() -> None:
            made = self.engine.session.run(list(outputs), {name: array.copy() for name, array in inputs.items()})
            scratch.fill(0xFF)  # what lies there is lost with every run of any context that shares it
            for (name, memory), values in zip(outputs.items(), made, strict=True):
                assert values.shape == memory.shape, name
                np.copyto(memory, values)

        driver.put(stream, "engine", run)

    def _memory(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        held = np.dtype(_HELD.get(dtype, dtype))
        nbytes = int(np.prod(shape, dtype=np.int64)) * held.itemsize
        driver = self.engine.runtime.driver
        return driver.view(driver.memory, self.addresses[name], nbytes).view(held).reshape(shape)

    def _dims(self) -> dict[str, DimRange]:
        """Value of every symbolic dimension, from the inputs' shapes."""
        found: dict[str, int] = {}
        for tensor in self.engine.spec.inputs:
            for dim, size in zip(tensor.shape, self.shapes[tensor.name], strict=True):
                if isinstance(dim, str):
                    factor, _, name = dim.rpartition("*")
                    assert found.setdefault(name, size // int(factor or 1)) * int(factor or 1) == size, dim
        if "units" in found:
            found["tokens"] = found["units"] * found["frames"]
        return {name: DimRange(size, size, size) for name, size in found.items()}


def stand_in(graph: str) -> bytes:
    """What lies in place of an engine."""
    return f"a stand-in for the engine of {graph}".encode()


def with_engines(
    bundle: Path,
    out: Path,
    graphs: Sequence[str] | None = None,
    *,
    builder: str = BUILDER,
    version: str = VERSION,
    capability: str = CAPABILITY,
    limits: Limits | None = None,
) -> Bundle:
    """A copy of a bundle that lists stand-ins as its engines, with records as the builder writes them."""
    if not out.exists():
        shutil.copytree(bundle, out)
    opened = Bundle.open(out)
    store = EngineStore(out, "tests")
    with store.held():
        for name in graphs if graphs is not None else opened.manifest.graphs:
            spec = opened.manifest.graphs[name]
            within = limits or Limits(max_context=min(1024, opened.manifest.kv.max_context), image_classes=(12, 64))
            dims = graph_dims(spec, within)
            place = engine_path(builder, "rtx-4090", opened.manifest.precision, name)
            scratch = store.scratch(place)
            scratch.write_bytes(stand_in(name))
            record = EngineRecord(
                graph=name,
                builder=builder,
                builder_version=version,
                target="rtx-4090",
                compute_capability=capability,
                precision=opened.manifest.precision,
                dtype=spec.precision,
                profiles=make_profiles(spec, dims, within.image_classes),
                fixed_dims=fixed_dims(dims),
                flags=("STRONGLY_TYPED",),
                onnx=graph_files(opened.manifest, name),
                engine=file_record(scratch),
                weights_bytes=0,
                layers={},
                build_seconds=0.0,
                peak_memory_bytes=0,
                key="0" * 64,
            )
            store.put(place, scratch, record)
    return opened


def feeds_of(backend: Any, count: int, start: int = 0, seed: int = 0) -> dict[str, NDArray[Any]]:
    """A thinker call of ``count`` tokens after ``start``."""
    width = backend._bundle.manifest.thinker.embedding_size
    embeds = np.random.default_rng(seed).standard_normal((1, count, width)).astype(np.float32)
    return {
        "inputs_embeds": embeds,
        "position_ids": np.tile(np.arange(start, start + count, dtype=np.int64), (3, 1, 1)),
        "kv_positions": np.arange(start + count, dtype=np.int64),
        "write_index": np.asarray([start], np.int64),
    }
