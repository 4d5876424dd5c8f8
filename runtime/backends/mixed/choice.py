"""Which backend ``auto`` runs each graph in on a CPU, and why; opens them as one."""

from __future__ import annotations

import importlib.metadata
import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from ...bundle.graph_spec import GraphSpec
from ...bundle.parts import PARTS
from ...bundle.reader import Bundle
from ...bundle.recipes import PRECISION_DTYPES
from ...errors import BackendError
from ...system import host
from ...system.files import cache_folder
from ..base import Backend
from ..composite import CompositeBackend
from ..onnxruntime import packages
from .graph_times import OPENVINO, ORT, TIMES_FOLDER, GraphTimes, TimesFile
from .measuring import budget, measure

_LOG = logging.getLogger(__name__)
#: OpenVINO is taken from here on: less is within what a shared machine's times differ by
QUICKER = 1.05
#: from this share of the processor on, other processes make a measurement doubtful: it is made again, when a bundle is
#: opened while the machine is less busy, until there are so many
BUSY, MOST_TIMES = 0.15, 3
#: seconds for which a machine is watched to see how busy it is
_WATCHED = 0.1
#: what a graph's results may differ by, as in validation (`omniport.export.validation.tolerances`), finest first;
#: integers on both sides: only values at a rounding step may fall on its other side
DIFFERENCES: Mapping[str, float] = {
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 8e-2,
    "int8": 0.1,
    "int4": 0.1,
    "fp8": 0.2,
}


@dataclass(frozen=True)
class Choice:
    """Where a graph runs. ``why``: a few words."""

    backend: str
    why: str


def openvino_version() -> str:
    """Version of the installed openvino; empty without. Imports nothing."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return ""


def openvino_alone() -> bool:
    """Whether OpenVINO is what this machine has to run graphs on its CPU."""
    return bool(openvino_version()) and not packages.installed()


def describe() -> str:
    """What ``auto`` does on this machine's CPU, in a line.

    Raises:
        UsageError: ``OMNIPORT_MEASURE`` is no number.
    """
    ours, theirs = "".join(packages.installed().values()), openvino_version()
    if not theirs or not ours:
        names = {"ONNX Runtime": ours, "OpenVINO": theirs}
        return next((f"{name} {version}, the only one" for name, version in names.items() if version), "nothing")
    seconds, folder = budget(), cache_folder()
    if folder is None:
        return f"ONNX Runtime {ours}: OpenVINO {theirs} is compared with it only where a cache folder keeps the times"
    when = f"measured for up to {seconds:g} s when a bundle is opened, and" if seconds else "as measured before, and"
    return f"ONNX Runtime {ours} or, where it is quicker, OpenVINO {theirs}: {when} kept in {folder / TIMES_FOLDER}"


def choices(bundle: Bundle, threads: int | None = None, compute: str | None = None) -> dict[str, Choice]:
    """Where ``auto`` runs each graph on this machine's CPU, by what is known now. Measures nothing."""
    graphs = bundle.manifest.graphs
    ours = "".join(packages.installed().values())
    if not openvino_version():
        return dict.fromkeys(graphs, Choice(ORT, "openvino is not installed"))
    if not ours:
        return dict.fromkeys(graphs, Choice(OPENVINO, "onnxruntime is not installed"))
    file = _file(bundle, threads, compute)
    known = {} if file is None else file.read()
    return {name: choose(spec, known.get(name), compute) for name, spec in graphs.items()}


def choose(spec: GraphSpec, times: GraphTimes | None, compute: str | None = None) -> Choice:
    """Where a graph runs, given what measuring it gave."""
    if spec.compute_dtype == "bfloat16":
        return Choice(OPENVINO, "ONNX Runtime has no bfloat16 on a CPU")
    if times is None:
        return Choice(ORT, "not measured yet")
    if times.problem:
        return Choice(ORT, times.problem)
    allowed = _allowed(spec, compute)
    if times.difference > allowed:
        return Choice(ORT, f"OpenVINO's result differs by {times.difference:.1g}, and {allowed:g} is allowed")
    ours, theirs = times.seconds[ORT], times.seconds[OPENVINO]
    why = f"OpenVINO takes {1e3 * theirs:,.1f} ms and ONNX Runtime {1e3 * ours:,.1f}"
    return Choice(OPENVINO if ours >= QUICKER * theirs else ORT, why)


def _allowed(spec: GraphSpec, compute: str | None) -> float:
    order = list(DIFFERENCES)
    named = (spec.precision, spec.compute_dtype, PRECISION_DTYPES[compute] if compute else "float32")
    return DIFFERENCES[max(named, key=order.index)]


def open_on_cpu(bundle: Bundle, threads: int | None = None, compute: str | None = None) -> Backend:
    """ONNX Runtime for the graphs that it is quicker with, and OpenVINO for those that it is quicker with.

    What is not known is measured first, for `budget` seconds at most; a RuntimeWarning says so before.

    Args:
        threads: of one operator. compute: ``bf16`` has OpenVINO compute float32 graphs in bfloat16.

    Raises:
        BackendError: neither runs here; or openvino is missing or the processor does not compute in bfloat16, and
            ``compute`` asks for it. UsageError: ``OMNIPORT_MEASURE`` is no number.
    """
    from ..onnxruntime.backend import OrtBackend
    from ..openvino.backend import OpenVinoBackend

    dtype = "float32" if compute is None else PRECISION_DTYPES[compute]
    if compute is not None:
        OpenVinoBackend(bundle, threads, dtype).close()  # refuses before anything is measured
    if openvino_version() and packages.installed():
        _measure_unknown(bundle, threads, compute)
    found = choices(bundle, threads, compute)
    held = [name for name, choice in found.items() if choice.backend == OPENVINO]
    if not held:
        return OrtBackend(bundle, threads=threads)
    try:
        openvino = OpenVinoBackend(bundle.with_graphs(held), threads, dtype)
    except BackendError as error:
        if openvino_alone():
            raise
        warnings.warn(f"ONNX Runtime runs {', '.join(held)}: {error}", RuntimeWarning, stacklevel=5)
        return OrtBackend(bundle, threads=threads)
    rest = [name for name in found if name not in held]
    if not rest:
        return openvino
    return CompositeBackend(openvino, held, OrtBackend(bundle.with_graphs(rest), threads=threads))


def _measure_unknown(bundle: Bundle, threads: int | None, compute: str | None) -> None:
    seconds, file = budget(), _file(bundle, threads, compute)
    if file is None or not seconds:
        return
    with file.reserved() as problem:
        known = file.read()
        unknown = [name for name in _ordered(bundle) if _is_unknown(bundle, name, known.get(name), seconds)]
        doubtful = [name for name in _ordered(bundle) if name not in unknown and _is_doubtful(known.get(name))]
        if doubtful and not problem and not _is_busy():
            unknown += doubtful
        if problem or not unknown:
            if unknown:
                _LOG.info("auto measures nothing of %s: %s", bundle.root, problem)
            return
        warnings.warn(
            f"which of ONNX Runtime and OpenVINO is quicker here with {', '.join(unknown)} of {bundle.root} is "
            f"measured now, for {seconds:g} s at most, and kept. OMNIPORT_MEASURE says how many seconds; 0 for none",
            RuntimeWarning,
            stacklevel=6,
        )
        count = threads if threads is not None else host.physical_cores()
        dtype = "float32" if compute is None else PRECISION_DTYPES[compute]
        found = measure(bundle.root, unknown, count, dtype, seconds)
        file.write({**known, **{name: _better(known.get(name), times) for name, times in found.items()}})
    for name, choice in choices(bundle, threads, compute).items():
        _LOG.info("auto runs %s in %s: %s", name, choice.backend, choice.why)


def _is_unknown(bundle: Bundle, name: str, times: GraphTimes | None, seconds: float) -> bool:
    if choose(bundle.manifest.graphs[name], GraphTimes(problem="-")).backend == OPENVINO:
        return False  # whatever its times are
    return times is None or 0 < times.budget < seconds


def _is_doubtful(times: GraphTimes | None) -> bool:
    return times is not None and not times.problem and times.busy >= BUSY and times.times < MOST_TIMES


def _is_busy() -> bool:
    watch = host.BusyWatch()
    time.sleep(_WATCHED)
    return (watch.share() or 0.0) >= BUSY


def _better(before: GraphTimes | None, now: GraphTimes) -> GraphTimes:
    """What to keep of two measurements: the one that others disturbed less, and how often it was measured."""
    if before is None or not before.seconds:
        return now
    kept = before if now.problem or before.busy < now.busy else now
    return msgspec.structs.replace(kept, times=before.times + 1)


def _ordered(bundle: Bundle) -> list[str]:
    """Graphs as they are measured: the last parts, which make the sound, take most of a reply's time."""
    return [name for name in reversed(PARTS) if name in bundle.manifest.graphs]


def _file(bundle: Bundle, threads: int | None, compute: str | None) -> TimesFile | None:
    versions = {OPENVINO: openvino_version(), ORT: "".join(packages.installed().values())}
    return TimesFile.of(bundle, versions, threads if threads is not None else host.physical_cores(), compute)
