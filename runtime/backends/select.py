"""Choose what runs a bundle on this machine: engines that can, with the reason why others do not; else ONNX Runtime,
and on a CPU OpenVINO for the graphs that it is quicker with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.engines import EngineRecord, build_line, list_engines
from ..bundle.recipes import PRECISION_DTYPES
from ..errors import BackendError, UsageError
from ..system import host
from .base import Backend, Loader
from .composite import CompositeBackend
from .tensorrt import packages

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from .tensorrt.backend import TrtBackend

#: opens a bundle on the CPU with that many threads
OpenOnCpu = Callable[["Bundle", "int | None"], Backend]


@dataclass(frozen=True)
class EngineHost:
    """What of this machine decides which engines it runs.

    Attributes:
        capability: compute capability of its GPU; None if it has none that can be used.
        versions: installed builders; the version is empty where the package does not say.
        no_gpu: why there is none, and what to check.
    """

    capability: str | None
    versions: dict[str, str]
    no_gpu: str = ""


def this_machine() -> EngineHost:
    """Ask the driver and the packages' metadata; imports neither builder."""
    versions = {builder: packages.installed_version(builder) or "" for builder in packages.installed()}
    capability = host.gpu_capability()
    return EngineHost(capability, versions, "" if capability else host.why_no_gpu())


def why_not(record: EngineRecord, host: EngineHost, bundle: Path) -> str:
    """Why an engine does not run here, and what mends it; empty if it does."""
    builder = record.builder
    again = build_line(bundle, "this", builder)
    if host.capability is None:
        return host.no_gpu
    if record.compute_capability != host.capability:
        return (
            f"it was built for compute capability {record.compute_capability}, and this machine's GPU has "
            f"{host.capability}. Build it here: {again}"
        )
    if builder not in host.versions:
        return packages.absent(builder)
    version = host.versions[builder]
    if version and version != record.builder_version:
        return f"{builder} {record.builder_version} built it, and {version} is installed. Build it again: {again}"
    return ""


def runnable_engines(bundle: Bundle) -> TrtBackend | None:
    """The engines of a bundle that this machine can run, of the builder that has more of them; None without any.

    Where there is a GPU, and ONNX Runtime will run a graph although the bundle lists an engine of it, a RuntimeWarning
    says why: engines are built to be quicker.

    Raises:
        BundleError: the bundle's list of engines cannot be trusted.
    """
    from .tensorrt.backend import TrtBackend

    host = this_machine()
    if host.capability is None:
        return None
    listed = list_engines(bundle)
    refused = {Path(name).stem: reason for name, reason in listed.unusable.items()}
    builders: dict[str, str] = {}
    for engine in listed.usable:
        if reason := why_not(engine.record, host, bundle.root):
            refused[engine.record.graph] = reason
        else:
            builders[engine.record.builder] = engine.record.graph
    found: list[TrtBackend] = []
    for builder, graph in builders.items():
        try:
            found.append(TrtBackend(bundle, builder))
        except BackendError as error:
            refused[graph] = str(error)
    best = max(found, key=lambda backend: len(backend.engines), default=None)
    left = [graph for graph in bundle.manifest.graphs if best is None or graph in best.missing]
    _warn(bundle.root, {graph: refused[graph] for graph in left if graph in refused})
    return best


def _warn(bundle: Path, refused: dict[str, str]) -> None:
    if not refused:
        return
    graph, reason = next(iter(refused.items()))
    rest = f" (so for {', '.join(list(refused)[1:])})" if len(refused) > 1 else ""
    warnings.warn(
        f"ONNX Runtime runs {graph} of {bundle} in place of its engine: {reason}{rest}", RuntimeWarning, stacklevel=6
    )


def open_auto(
    bundle: Bundle, threads: int | None, open_on_cpu: OpenOnCpu | None = None, compute: str | None = None
) -> Backend:
    """Engines that this machine runs; for the rest of the graphs ONNX Runtime, on a CUDA device if it can use one.

    Where no GPU is used, OpenVINO runs the graphs that it is quicker with (`mixed.choice`).

    Args:
        open_on_cpu: takes the place of what runs graphs on the CPU.
        compute: as of `omniport.runtime.backends.open_backend`; for a CPU alone.

    Raises:
        BackendError, BundleError: as `omniport.runtime.backends.open_backend`.
    """
    engines = runnable_engines(bundle)
    if engines is not None and not engines.missing and compute is None:
        return engines
    from .mixed import choice
    from .onnxruntime.backend import OrtBackend

    rest = bundle if engines is None else bundle.with_graphs(engines.missing)
    cuda = not choice.openvino_alone() and _cuda_runs()
    if compute is not None and (cuda or engines is not None):
        raise UsageError(
            f"backend 'auto' takes this machine's GPU, which computes as the bundle's graphs say; {compute} is for "
            "backend 'openvino'"
        )
    if cuda:
        others: Backend = OrtBackend(rest, device="cuda", threads=threads)
    elif open_on_cpu is not None:
        others = open_on_cpu(rest, threads)
    elif engines is not None:
        others = OrtBackend(rest, threads=threads)
    else:
        others = choice.open_on_cpu(rest, threads, compute)
    return others if engines is None else CompositeBackend(engines, engines.engines, others)


def _cuda_runs() -> bool:
    """Whether ONNX Runtime runs on a CUDA device here. Where there is one that it could use, a RuntimeWarning says why
    it does not."""
    from .onnxruntime.cuda_provider import why_no_cuda
    from .onnxruntime.packages import import_onnxruntime, wanted_extra

    reason = why_no_cuda(import_onnxruntime())
    if reason and wanted_extra() == "ort-gpu":
        warnings.warn(f"ONNX Runtime runs on the CPU, although there is a GPU: {reason}", RuntimeWarning, stacklevel=5)
    return not reason


def _open(name: str, bundle: Bundle, threads: int | None) -> Backend:
    return open_auto(bundle, threads)


def _open_in(name: str, bundle: Bundle, threads: int | None, compute: str) -> Backend:
    (asked,) = (short for short, dtype in PRECISION_DTYPES.items() if dtype == compute)
    return open_auto(bundle, threads, compute=asked)


def _problems(name: str, packages: Mapping[str, str | None], gpu: bool) -> list[str]:
    return []  # it takes what there is


LOADER = Loader(_open, _problems, _open_in)
