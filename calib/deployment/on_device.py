"""Start a deployed bundle on its device: build the engines that are missing, and let it answer once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from omniport.export.devices.catalog import THIS
from omniport.export.devices.detect import find_target
from omniport.export.devices.install import advise, this_machine
from omniport.runtime.backends.tensorrt.packages import installed_version
from omniport.runtime.bundle.engines import find_engine
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BundleError, UsageError
from omniport.runtime.system import host
from omniport.runtime.system.progress import Progress

from .deploy_figures import compared
from .deploy_record import Deployment, FirstReply, read_record
from .first_reply import measure_first_reply


@dataclass(frozen=True)
class StartReport:
    """What was found on the device.

    Attributes:
        built: graphs whose engines were built now.
        compared: (what, planned, measured).
    """

    built: tuple[str, ...]
    reply: FirstReply
    compared: tuple[tuple[str, str, str], ...]


def prepare(bundle: Path, progress: Progress | None = None) -> StartReport:
    """Build the engines that are missing or out of date, and measure a reply.

    Raises:
        UsageError: the folder was not written by ``omniport deploy``, or is for another device.
        BundleError, BackendError, BuildError: it cannot be built or run here.
        CheckFailed: it does not answer.
    """
    Bundle.open(bundle)
    record = read_record(bundle)
    built = _build(bundle, record, progress) if record.plan.builder else ()
    if progress is not None:
        progress("a first reply", 0, 1)
    reply = measure_first_reply(bundle, record.plan.builder or "ort-cpu")
    return StartReport(built, reply, tuple(compared(msgspec.structs.replace(record, reply=reply))))


def _build(bundle: Path, record: Deployment, progress: Progress | None) -> tuple[str, ...]:
    from omniport.export.tensorrt.build import build_engines

    plan, here = record.plan, host.gpu_capability()
    wanted = find_target(plan.target).capability if plan.target != THIS else here
    if here is None or here != wanted:
        found = f"its GPU has compute capability {here}" if here else "it has no GPU that the CUDA driver can use"
        raise UsageError(
            f"{bundle} is for {plan.title} (compute capability {wanted}), and this machine is another: {found}. Copy "
            "the folder to the device and run omniport start there; omniport run BUNDLE --backend ort-cpu runs it here"
        )
    missing = _missing(Bundle.open(bundle), plan.builder, here)
    if missing:
        build_engines(bundle, plan.target, builder=plan.builder, graphs=missing, progress=progress)
    return missing


def _missing(bundle: Bundle, builder: str, capability: str) -> tuple[str, ...]:
    """Graphs without an engine that the installed builder's runtime takes.

    Raises:
        BackendError: the builder is not installed.
    """
    version = installed_version(builder)
    if version is None:
        raise BackendError(f"{builder} is not installed here, and runs the engines: {advise(this_machine()).how}")
    names = []
    for name in bundle.manifest.graphs:
        try:
            find_engine(bundle, name, builder=builder, version=version, capability=capability)
        except (BackendError, BundleError):
            names.append(name)
    return tuple(names)
