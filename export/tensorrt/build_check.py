"""Check a target without having it.

Proves that graphs parse, that the nearest capability compiles, and that number formats and memory fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omniport.runtime.bundle.engines import graph_files
from omniport.runtime.bundle.graph_spec import DTYPES
from omniport.runtime.bundle.manifest import DecoderGeometry
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BuildError
from omniport.runtime.system.files import scratch_folder
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress

from ..devices.catalog import BUILD_CONSTANT, BUILD_FACTOR, RTX_CAPABILITIES, Target, nearest_rtx_capability
from ..devices.detect import find_target
from .build import check_bundle_precision, on_device, require_ranges
from .builder_api import Api, load_api, too_old_for
from .engine_builder import build_engine, check_precision
from .network import export_without
from .onnx_file import open_onnx
from .profiles import EngineLimits, Limits, graph_dims, limits_of


@dataclass(frozen=True)
class GraphCheck:
    """One graph.

    Attributes:
        compiled_for: capability it was compiled for, empty if it did not come so far.
        engine_bytes: size of that engine, which was thrown away.
        problem: why the target cannot have it; empty if nothing was found.
        note: what the user should know all the same.
    """

    graph: str
    compiled_for: str
    engine_bytes: int
    problem: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found.

    Attributes:
        memory_needed: bytes of weights and caches. memory_usable: bytes that engines may take on the target.
        build_memory: bytes that building the largest graph takes of the machine that builds.
        command: builds the engines.
    """

    bundle: Path
    target: Target
    graphs: tuple[GraphCheck, ...]
    memory_needed: int
    memory_usable: int
    build_memory: int
    command: str

    @property
    def fits(self) -> bool:
        """Whether weights and caches fit the target's memory."""
        return self.memory_needed <= self.memory_usable

    @property
    def builds_there(self) -> bool:
        """Whether a target that has to build for itself has the memory to: engines are not loaded while it does."""
        return self.target.built_anywhere or not self.target.unified or self.build_memory <= self.memory_usable

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.fits and self.builds_there and not any(graph.problem for graph in self.graphs)


@paths_checked
def check_engines(
    bundle: str | os.PathLike[str],
    target: str,
    *,
    precision: str | None = None,
    graphs: Sequence[str] | None = None,
    limits: EngineLimits | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Prove what can be proven here with tensorrt-rtx about a bundle's engines on a target; nothing is kept.

    Args:
        bundle: its folder.
        target, precision, graphs, limits, progress: as for `omniport.export.tensorrt.build.build_engines`.

    Raises:
        BundleError: the bundle cannot be used.
        UsageError: no such target, or a precision or limit that does not go with the bundle.
        BackendError: tensorrt-rtx is not installed.
    """
    opened, machine = Bundle.open(bundle), find_target(target)
    return check_bundle(
        opened,
        machine,
        precision=precision,
        graphs=graphs,
        limits=limits_of(opened.manifest, limits or EngineLimits()),
        progress=progress,
    )


def check_bundle(
    bundle: Bundle,
    target: Target,
    *,
    precision: str | None = None,
    graphs: Sequence[str] | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """As `check_engines`, of what is opened and found."""
    limits = limits or Limits()
    check_bundle_precision(bundle, precision)
    api = load_api("tensorrt-rtx")
    names = [name for name in bundle.manifest.graphs if graphs is None or name in graphs]
    with scratch_folder("omniport-check-") as folder:
        rows = tuple(_check(api, bundle, name, target, limits, folder, progress) for name in names)
    return CheckReport(
        bundle=bundle.root,
        target=target,
        graphs=rows,
        memory_needed=memory_needed(bundle, names, limits),
        memory_usable=target.memory_usable,
        build_memory=build_memory(bundle, names),
        command=on_device(target, str(bundle.root))
        if not target.built_anywhere
        else f"omniport build {bundle.root} --target {target.name}",
    )


def build_memory(bundle: Bundle, graphs: Sequence[str]) -> int:
    """Bytes that building takes, one graph at a time."""
    sizes = [sum(record.size for record in graph_files(bundle.manifest, name).values()) for name in graphs]
    return int(BUILD_FACTOR * max(sizes, default=0)) + BUILD_CONSTANT


def memory_needed(bundle: Bundle, graphs: Sequence[str], limits: Limits) -> int:
    """Bytes of the weights of these graphs, all loaded at once, and of one KV cache for each decoder.

    A cache that grows is there twice: each call copies it from one side to the other.
    """
    manifest = bundle.manifest
    weights = sum(record.size for name in graphs for record in graph_files(manifest, name).values())
    context = limits.max_context or manifest.kv.max_context
    caches = [cache_bytes(g, context, manifest.kv.dtype) for name, g in manifest.decoders.items() if name in graphs]
    return weights + sum(caches) * (2 if manifest.kv.form == "concat" else 1)


def cache_bytes(geometry: DecoderGeometry, context: int, dtype: str) -> int:
    """Bytes of the keys and values of every layer for that many tokens."""
    return 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * context * DTYPES[dtype]


def _check(
    api: Api, bundle: Bundle, name: str, target: Target, limits: Limits, folder: Path, progress: Progress | None
) -> GraphCheck:
    spec = bundle.manifest.graphs[name]
    path = bundle.path(spec.file)
    onnx_file = open_onnx(path)
    graph_dims(spec, limits)
    stand_in = _stand_in(target, onnx_file.formats())
    try:
        require_ranges(bundle, name)
        check_precision(name, onnx_file.formats(), target, target.builder)
        note = _release_note(onnx_file.needs(), onnx_file.opset, target)
        if stand_in is None:
            raise BuildError(f"{name}: no capability that tensorrt-rtx compiles for has all of its formats")
        out = folder / f"{name}.engine"
        build_engine(api, path, spec, stand_in, out, limits=limits, progress=progress)
    except (BuildError, BackendError) as error:
        return GraphCheck(name, "", 0, str(error))
    size = out.stat().st_size
    out.unlink()
    return GraphCheck(name, stand_in.capability, size, "", note)


def _stand_in(target: Target, formats: frozenset[str]) -> Target | None:
    """A target that tensorrt-rtx compiles for, nearest to this one, that has the graph's formats."""
    nearest = nearest_rtx_capability(target.capability)
    order = [nearest, *(known for known in RTX_CAPABILITIES if known != nearest)]
    known = {t.capability: t for t in map(find_target, ("rtx-2080", "a100", "rtx-3090", "rtx-4090", "rtx-5090"))}
    return next((known[c] for c in order if c in known and formats <= set(known[c].precisions)), None)


def _release_note(operators: frozenset[str], opset: int, target: Target) -> str:
    """Which of the target's JetPack releases parse the graph.

    Raises:
        BuildError: none does.
    """
    if not target.jetpacks:
        return ""
    lacking = {release: too_old_for(operators, opset, release.tensorrt) for release in target.jetpacks}
    good = [release for release, what in lacking.items() if not what]
    if len(good) == len(lacking):
        return ""
    old = [
        f"TensorRT {r.tensorrt} of JetPack {r.version} does not parse {', '.join(w)}" for r, w in lacking.items() if w
    ]
    other = export_without(what for row in lacking.values() for what in row)
    if not good:
        raise BuildError(f"{'; '.join(old)}. Export with older operators: {other}")
    return f"needs JetPack {good[0].version} (TensorRT {good[0].tensorrt}): {'; '.join(old)}; or export with {other}"
