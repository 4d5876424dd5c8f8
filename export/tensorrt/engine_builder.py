"""Build the engine of one graph. Imports neither torch nor transformers: it also runs on the device.

Networks are strongly typed: the graph says every dtype, and the builder chooses none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniport.runtime.bundle.engines import Profile
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.errors import BuildError
from omniport.runtime.system.files import replace_file
from omniport.runtime.system.host import MemoryWatch
from omniport.runtime.system.progress import Progress

from ..devices.catalog import Target, precisions_of
from .builder_api import Api
from .interruptible import Cancelled, run_interruptible
from .network import Parsed, check_unused, parse
from .onnx_file import open_onnx
from .profiles import Limits, fixed_dims, graph_dims, make_profiles

#: progress is told in thousandths
_STEPS = 1000
#: of a memory that the system and this program live in as well, one part may be a kernel's: builders allow all of it
_WORKSPACE_SHARE = 8
#: tensorrt-rtx gives Turing FP32 and FP16 only (support matrix of TensorRT-RTX 1.4)
_RTX_LACKS = {"7.5": frozenset({"int8", "int4"})}


@dataclass(frozen=True)
class Built:
    """What a build made. ``peak_memory``: resident bytes above those before it; 0 where nobody can say."""

    profiles: tuple[Profile, ...]
    fixed: dict[str, int]
    layers: dict[str, int]
    weights_bytes: int
    seconds: float
    peak_memory: int
    tf32: bool


def build_engine(
    api: Api,
    graph: Path,
    spec: GraphSpec,
    target: Target,
    out: Path,
    *,
    limits: Limits | None = None,
    capability: str | None = None,
    tf32: bool = False,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build one engine.

    Args:
        graph: the ONNX file.
        out: file to write, removed again when the build does not go well.
        capability: compute capability to compile for, where the target's has no compiler here.
        tf32: let a float32 graph's products be rounded to TF32.
        timing_cache: kernel timings to start from and to add to, for builders that measure.
        progress: called with what is being built, and thousandths done.

    Raises:
        BuildError: the graph cannot become the engine that its spec describes, or the builder failed.
        BackendError: the builder cannot compile for the target.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    started = time.perf_counter()
    watch = MemoryWatch()
    limits = limits or Limits()
    onnx_file = open_onnx(graph)
    check_precision(spec.name, onnx_file.formats(), target, api.builder)
    dims = graph_dims(spec, limits)
    fixed, profiles = fixed_dims(dims), make_profiles(spec, dims, limits.image_classes)

    def work(cancelled: threading.Event) -> Parsed:
        parsed = parse(api, onnx_file, spec, fixed)
        config = _configure(api, parsed, profiles, timing_cache)
        api.set_capability(config, capability or target.capability)
        api.allow_tf32(config, uses_tf32(spec, tf32))
        if target.unified:
            api.limit_workspace(config, target.memory_bytes // _WORKSPACE_SHARE)
        _compile(api, parsed, config, out, _stepper(spec.name, progress, cancelled))
        if timing_cache is not None:
            _keep_timings(config, timing_cache)
        return parsed

    def look() -> None:
        watch.look()
        onnx_file.release()

    try:
        parsed = run_interruptible(work, look)
        check_unused(spec.name, api.messages())
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return Built(
        profiles=profiles,
        fixed=fixed,
        layers=parsed.layers,
        weights_bytes=onnx_file.weights_bytes,
        seconds=time.perf_counter() - started,
        peak_memory=watch.peak(),
        tf32=uses_tf32(spec, tf32),
    )


def check_precision(graph: str, formats: frozenset[str], target: Target, builder: str) -> None:
    """Whether the target computes in every number format that the graph uses.

    Raises:
        BuildError: names the formats it lacks and those it has.
    """
    lacks = _RTX_LACKS.get(target.capability, frozenset()) if builder == "tensorrt-rtx" else frozenset()
    has = [name for name in target.precisions if name not in lacks]
    missing = sorted(formats - set(has))
    if not missing:
        return
    with_it = [name for name in ("7.5", "8.0", "8.9", "10.0") if not set(missing) - set(precisions_of(name))]
    newer = f"; compute capability {with_it[0]} and later have it" if with_it else ""
    raise BuildError(
        f"{graph} uses {', '.join(missing)}, which {target.name} ({target.sm}) lacks with {builder}: it has "
        f"{', '.join(has)}{newer}. Export or quantize the bundle in one of these"
    )


def uses_tf32(spec: GraphSpec, asked: bool) -> bool:
    """Whether products of a graph's float32 values may be rounded to ten bits.

    In a float32 graph only if asked: it would miss what float32 promises (1e-4; one product gave 2.9e-4). In one of a
    half precision what stays in float32 does so for its range, which TF32 has.
    """
    return asked or spec.compute_dtype != "float32"


def _configure(api: Api, parsed: Parsed, profiles: tuple[Profile, ...], timing_cache: Path | None) -> Any:
    config = api.given(parsed.builder.create_builder_config(), "configuration")
    api.require_user_allocation(config, parsed.graph)
    for number, profile in enumerate(profiles):
        made = api.given(parsed.builder.create_optimization_profile(), "optimization profile")
        for tensor in parsed.inputs().values():
            if tensor.name in profile.inputs:
                shapes = profile.inputs[tensor.name]
                made.set_shape(tensor.name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(made) != number:
            raise BuildError(f"{parsed.graph}: {api.builder} does not take profile {number}: {api.reason()}")
    if timing_cache is not None and api.features.timing_cache:
        held = timing_cache.read_bytes() if timing_cache.is_file() else b""
        if not _take_timings(config, held):  # damaged, or another GPU's
            _take_timings(config, b"")
            api.messages()
    return config


def _take_timings(config: Any, held: bytes) -> bool:
    cache = config.create_timing_cache(held)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def _stepper(graph: str, progress: Progress | None, cancelled: threading.Event) -> Callable[[float], bool]:
    """What the builder calls with the share that is done; it stops when it hears False."""

    def step(share: float) -> bool:
        if progress is not None and not cancelled.is_set():
            progress(f"building {graph}", int(share * _STEPS), _STEPS)
        return not cancelled.is_set()

    return step


def _compile(api: Api, parsed: Parsed, config: Any, out: Path, step: Callable[[float], bool]) -> None:
    """Write the engine to ``out``.

    Raises:
        BuildError: the builder gave up; with its messages. Also when it was told to stop, which nobody sees then.
    """
    if not step(0.0):
        raise Cancelled
    if api.features.progress:
        config.progress_monitor = monitor = api.progress_monitor(step)  # noqa: F841 - the builder keeps no reference
    with open(out, "wb") as file:
        if api.features.streamed_engine:
            writer = api.stream_writer(file.write)
            made = bool(parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer))
            if writer.error is not None:
                raise writer.error
        else:
            engine = parsed.builder.build_serialized_network(parsed.network, config)
            made = engine is not None
            file.write(memoryview(engine) if made else b"")
    if not made or out.stat().st_size == 0:
        raise BuildError(f"{parsed.graph}: the builder failed: {api.reason()} ({api.builder} {api.version})")


def _keep_timings(config: Any, timing_cache: Path) -> None:
    cache = config.get_timing_cache()
    if cache is not None and (held := cache.serialize()) is not None:
        replace_file(timing_cache, bytes(memoryview(held)))
