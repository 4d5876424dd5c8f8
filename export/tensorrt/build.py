"""Build a bundle's engines for a target: choose the builder, skip what did not change, record what was built."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from omniport.runtime.backends.tensorrt import packages
from omniport.runtime.bundle.activation_ranges import limit, overflowing
from omniport.runtime.bundle.engines import EngineRecord, engine_path, graph_files
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.listed_files import file_record, sha256_of
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.bundle.staging import check_space
from omniport.runtime.errors import BackendError, BuildError, BundleError, UsageError
from omniport.runtime.system import host
from omniport.runtime.system.files import cache_folder
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress

from ..devices.catalog import THIS, Target
from ..devices.detect import find_target
from ..source_code import json_key, package_digest
from .builder_api import Api, load_api
from .engine_builder import Built, build_engine
from .engine_store import EngineStore
from .interruptible import run_interruptible
from .profiles import EngineLimits, Limits, graph_dims, limits_of, make_profiles


@dataclass(frozen=True)
class GraphBuild:
    """One graph of a build. ``built``: False when the engine that was there is still right."""

    graph: str
    path: Path
    built: bool
    record: EngineRecord


@dataclass
class BuildReport:
    """What a build made."""

    bundle: Path
    target: Target
    builder: str
    version: str
    graphs: list[GraphBuild] = field(default_factory=list)
    seconds: float = 0.0


@paths_checked
def build_engines(
    bundle: str | os.PathLike[str],
    target: str,
    *,
    builder: str = "auto",
    precision: str | None = None,
    graphs: Sequence[str] | None = None,
    limits: EngineLimits | None = None,
    tf32: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build TensorRT engines from a bundle, those that are missing or out of date, into its folder ``engines``.

    Args:
        bundle: its folder.
        target: name of the machine to build for (``omniport targets``); ``this`` is the GPU in here.
        builder: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        precision: what the caller believes the bundle to be; the bundle decides.
        graphs: these only; all by default.
        limits: what engines are to take, where that is less than the bundle allows.
        tf32: let products of float32 graphs be rounded to TF32, which is quicker and misses float32's tolerance; so
            does ``OMNIPORT_TF32=1``.
        force: build also what did not change.
        progress: called with the stage, and thousandths done and in all.

    Raises:
        BundleError: the bundle cannot be used.
        UsageError: no such target, or a precision, graph or limit that does not go with the bundle.
        BackendError: no builder for the target is installed, or the target's engines are built elsewhere.
        BuildError: a graph cannot become the engine its spec describes (engines built before it stay), or one holds
            values in float16 that were observed too large for it (nothing is built).
    """
    opened, machine = Bundle.open(bundle), find_target(target)
    return build_bundle(
        opened,
        machine,
        builder=builder,
        precision=precision,
        graphs=graphs,
        limits=limits_of(opened.manifest, limits or EngineLimits()),
        tf32=tf32,
        force=force,
        progress=progress,
    )


def build_bundle(
    bundle: Bundle,
    target: Target,
    *,
    builder: str = "auto",
    precision: str | None = None,
    graphs: Sequence[str] | None = None,
    limits: Limits | None = None,
    tf32: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """As `build_engines`, of what is opened and found."""
    started = time.perf_counter()
    limits, tf32 = limits or Limits(), tf32 or host.tf32_asked()
    check_bundle_precision(bundle, precision)
    names = _chosen(bundle, graphs)
    for name in names:
        require_ranges(bundle, name)
    chosen = choose_builder(target, builder, str(bundle.root))
    report = BuildReport(bundle.root, target, chosen, builder_version(chosen))
    store = EngineStore(bundle.root, f"omniport {importlib.metadata.version('omniport')}")
    api: Api | None = None
    with store.held():
        for name in names:
            spec = bundle.manifest.graphs[name]
            place = engine_path(chosen, target.name, bundle.manifest.precision, name)
            key = engine_key(bundle, spec, target, chosen, report.version, limits, tf32)
            held = store.record(place)
            if held is not None and held.key == key and not force:
                report.graphs.append(GraphBuild(name, bundle.root / place, False, held))
                continue
            api = api or run_interruptible(lambda _: load_api(chosen), lambda: None)
            record = _build(api, bundle, spec, target, store, place, key, limits, tf32, progress)
            report.graphs.append(GraphBuild(name, bundle.root / place, True, record))
    report.seconds = time.perf_counter() - started
    return report


def check_bundle_precision(bundle: Bundle, precision: str | None) -> None:
    """Whether a bundle is of the precision asked for.

    Raises:
        UsageError: it is not; says what makes one.
    """
    held = bundle.manifest.precision
    if precision is None or precision == held:
        return
    made_by = (
        f"omniport export CHECKPOINT OUT --precision {precision}"
        if precision in ("fp32", "fp16", "bf16")
        else f"omniport quantize {bundle.root} --recipe {precision} OUT"
    )
    raise UsageError(
        f"--precision {precision}: {bundle.root} is {held}, and its graphs say the dtype of every value, so the bundle "
        f"decides what its engines compute in. Make a bundle in {precision}: {made_by}"
    )


def require_ranges(bundle: Bundle, graph: str) -> None:
    """Whether a float16 graph holds in float16 only what was observed to fit; nothing without measured ranges.

    Raises:
        BuildError: an observed value would overflow; says how to keep it in float32.
    """
    found = overflowing(bundle, graph)
    if found:
        worst = ", ".join(f"{layer.name} ({layer.max:.3g})" for layer in found[:3])
        raise BuildError(
            f"{graph} holds {len(found)} values in float16 that were observed beyond {limit():.0f}, half of what it "
            f"can hold: {worst}. The engine would give infinities. Export again so that they stay in float32: omniport "
            f"export CHECKPOINT OUT --precision fp16 --ranges {bundle.root / str(bundle.manifest.ranges_file)}"
        )


def choose_builder(target: Target, builder: str, bundle: str = "BUNDLE") -> str:
    """Which package builds for a target here.

    Args:
        builder: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        BackendError: none that is installed can, or the engines are built on the target itself.
    """
    if builder == "tensorrt-rtx" and not target.built_anywhere:
        raise BackendError(
            f"tensorrt-rtx does not build for {target.name} ({target.sm}): its engines come from the TensorRT on the "
            f"device. Run there: {on_device(target, bundle)}"
        )
    here = packages.installed()
    if builder == "auto" and target.built_anywhere and ("tensorrt-rtx" in here or "tensorrt" not in here):
        return _require("tensorrt-rtx", here)
    if builder == "tensorrt-rtx":
        return _require(builder, here)
    # TensorRT measures kernels on the GPU that it builds for
    found = host.gpu_capability() if target.name != THIS else target.capability
    if found != target.capability:
        what = f"this machine's has {found}" if found else "this machine has none"
        raise BackendError(
            f"engines of {target.name} are built on the device: TensorRT needs a GPU of compute capability "
            f"{target.capability}, and {what}. Run there: {on_device(target, bundle)}. Add --check to prove here what "
            "can be proven without it"
        )
    return _require("tensorrt", here)


def on_device(target: Target, bundle: str) -> str:
    """The command to run on the target."""
    return f"omniport build {bundle} --target {target.name} --builder tensorrt"


def builder_version(builder: str) -> str:
    """Version of an installed builder, from its metadata; the package itself is imported only where there is none."""
    return packages.installed_version(builder) or load_api(builder).version


def engine_key(
    bundle: Bundle, spec: GraphSpec, target: Target, builder: str, version: str, limits: Limits, tf32: bool = False
) -> str:
    """sha256 over everything that an engine is made from."""
    return json_key(
        {name: record.sha256.lower() for name, record in graph_files(bundle.manifest, spec.name).items()},
        msgspec.to_builtins((spec.inputs, spec.outputs, spec.aliases)),
        msgspec.to_builtins(make_profiles(spec, graph_dims(spec, limits), limits.image_classes)),
        (builder, version, target.name, target.capability, tf32),
        package_digest("tensorrt"),
    )


def _build(
    api: Api,
    bundle: Bundle,
    spec: GraphSpec,
    target: Target,
    store: EngineStore,
    place: str,
    key: str,
    limits: Limits,
    tf32: bool,
    progress: Progress | None,
) -> EngineRecord:
    files = graph_files(bundle.manifest, spec.name)
    size = sum(record.size for record in files.values())
    check_space(bundle.root / place, size)
    _check_files(bundle, spec, size, progress)
    scratch = store.scratch(place)
    timings = _timings(api, target) if api.features.timing_cache else None
    built = build_engine(
        api,
        bundle.path(spec.file),
        spec,
        target,
        scratch,
        limits=limits,
        tf32=tf32,
        timing_cache=timings,
        progress=progress,
    )
    try:
        record = _record(api, bundle, spec, target, built, scratch, key)
        store.put(place, scratch, record)
    finally:
        scratch.unlink(missing_ok=True)
    return record


def _record(
    api: Api, bundle: Bundle, spec: GraphSpec, target: Target, built: Built, engine: Path, key: str
) -> EngineRecord:
    return EngineRecord(
        graph=spec.name,
        builder=api.builder,
        builder_version=api.version,
        target=target.name,
        compute_capability=target.capability,
        precision=bundle.manifest.precision,
        dtype=spec.precision,
        profiles=built.profiles,
        fixed_dims=built.fixed,
        flags=api.flag_names(spec.name, built.tf32),
        onnx=graph_files(bundle.manifest, spec.name),
        engine=file_record(engine),
        weights_bytes=built.weights_bytes,
        layers=dict(sorted(built.layers.items())),
        build_seconds=round(built.seconds, 3),
        peak_memory_bytes=built.peak_memory,
        key=key,
    )


def _check_files(bundle: Bundle, spec: GraphSpec, size: int, progress: Progress | None) -> None:
    """The graph's files are those that bundle.json lists: the record will say that the engine was built from them."""
    done = 0

    def advance(read: int) -> None:
        nonlocal done
        done += read
        if progress is not None:
            progress(f"reading {spec.name}", done, size)

    for name, record in graph_files(bundle.manifest, spec.name).items():
        if sha256_of(bundle.path(name), advance) != record.sha256.lower():
            raise BundleError(
                f"{name} in {bundle.root} is not the file that bundle.json lists (sha256). Copy or export the bundle "
                "again"
            )


def _chosen(bundle: Bundle, graphs: Sequence[str] | None) -> list[str]:
    held = bundle.manifest.graphs
    absent = [name for name in graphs or () if name not in held]
    if absent:
        raise UsageError(f"{bundle.root} has no graph {', '.join(absent)}; it has {', '.join(held)}")
    names = [name for name in held if graphs is None or name in graphs]
    if not names:
        raise BuildError(f"{bundle.root} has no graphs to build: export it again")
    return names


def _require(builder: str, here: Sequence[str]) -> str:
    if builder not in here:
        raise BackendError(packages.absent(builder))
    return builder


def _timings(api: Api, target: Target) -> Path | None:
    """The kernel timings kept for a target: they depend on the builder's version and on the GPU."""
    cache = cache_folder()
    if cache is None:
        return None
    folder = cache / "timings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a cache that cannot be written is no reason to fail
        return None
    return folder / f"{api.builder}-{api.version}-{target.sm}-{target.name}.cache"
