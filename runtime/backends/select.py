"""Choose the engines that run on this machine, and explain why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.engines import EngineRecord, build_line, list_engines
from ..errors import BackendError
from ..system import host
from .tensorrt import runtime_api as trt_runtime

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from .tensorrt.backend import TrtBackend


@dataclass(frozen=True)
class Here:
    """What of this machine decides which engines it runs.

    Attributes:
        capability: compute capability of its GPU; None if it has none that can be used.
        versions: installed builders; the version is empty where the package does not say.
        bindings: cuda-bindings is installed.
    """

    capability: str | None
    versions: dict[str, str]
    bindings: bool


def this_machine() -> Here:
    """Ask the driver and the packages' metadata; imports neither builder."""
    versions = {builder: installed_version(builder) or "" for builder in trt_runtime.installed_runtimes()}
    return Here(host.gpu_capability(), versions, _has_bindings())


def _has_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def installed_version(builder: str) -> str | None:
    """Version of an installed builder, from its metadata; None if that does not say."""
    for name in (builder, f"{builder}-cu13", f"{builder}-cu12", trt_runtime.MODULES[builder]):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def why_not(record: EngineRecord, here: Here, bundle: Path) -> str:
    """Why an engine does not run here, and what mends it; empty if it does."""
    builder = record.builder
    again = build_line(bundle, "this", builder)
    if here.capability is None:
        return "this machine has no NVIDIA GPU that can be used: check nvidia-smi"
    if record.compute_capability != here.capability:
        return (
            f"it was built for compute capability {record.compute_capability}, and this machine's GPU has "
            f"{here.capability}. Build it here: {again}"
        )
    install = f"pip install 'omniport[{trt_runtime.EXTRAS[builder]}]'"
    if builder not in here.versions:
        return f"{builder} is not installed here: {install}"
    version = here.versions[builder]
    if version and version != record.builder_version:
        return f"{builder} {record.builder_version} built it, and {version} is installed. Build it again: {again}"
    if not here.bindings:
        return f"cuda-bindings is not installed here: {install}"
    return ""


def engines_here(bundle: Bundle) -> TrtBackend | None:
    """The engines of a bundle that this machine can run, of the builder that has more of them; None without any.

    Where there is a GPU, and ONNX Runtime will run a graph although the bundle lists an engine of it, a RuntimeWarning
    says why: engines are built to be quicker.

    Raises:
        BundleError: the bundle's list of engines cannot be trusted.
    """
    from .tensorrt.backend import TrtBackend

    here = this_machine()
    if here.capability is None:
        return None
    listed = list_engines(bundle)
    refused = {Path(name).stem: reason for name, reason in listed.unusable.items()}
    builders: dict[str, str] = {}
    for engine in listed.usable:
        if reason := why_not(engine.record, here, bundle.root):
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
        f"ONNX Runtime runs {graph} of {bundle} in place of its engine: {reason}{rest}", RuntimeWarning, stacklevel=4
    )
