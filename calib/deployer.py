"""Deploy a checkpoint to a device: plan, calibrate, export and quantize graph by graph, validate, build, measure.

What is finished is kept beside OUT until all is: a rerun goes on where an interrupted one stopped, and does nothing
where nothing changed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.checkpoint.config import read_json
from omniport.export.evaluation.conversations import read_lines
from omniport.export.graphs.fingerprint import source_key
from omniport.export.planning.shapes import PUBLISHED, find_model, shape_of_config
from omniport.export.source_code import json_key, tracing_key
from omniport.runtime.backends.tensorrt import packages
from omniport.runtime.bundle.listed_files import sha256_of
from omniport.runtime.bundle.reader import MANIFEST_FILE, Bundle
from omniport.runtime.bundle.staging import check_space, previous_manifest
from omniport.runtime.errors import BundleError, CheckpointError, UsageError
from omniport.runtime.system.files import remove_folder, replace_file
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress

from .calibration_file import Calibration
from .deployment.deploy_graphs import assemble, make_graphs, plan_graphs
from .deployment.deploy_page import render
from .deployment.deploy_plan import Asked, plan_deployment
from .deployment.deploy_record import (
    PAGE_FILE,
    Deployment,
    DeployPlan,
    Engine,
    Validated,
    find_record,
    write_record,
)
from .deployment.deploy_work import DeployWork, Meter, deploy_work
from .deployment.first_reply import measure_alone
from .deployment.whole_progress import WholeProgress

VALIDATIONS = ("quick", "none")
CPU = "cpu"
#: share of the whole that a stage is taken for
_SHARES = {"calibrate": 40.0, "graphs": 25.0, "bundle": 5.0, "validate": 20.0, "engines": 15.0, "reply": 5.0}
_BY_PART = ("calibrate", "engines")


@dataclass(frozen=True)
class DeployReport:
    """What a deployment gave.

    Attributes:
        path: the bundle's folder.
        page: the page with the plan beside what was measured.
        did: stages that this call carried out; none where all was finished.
        next: what is left to be run, in a line of a shell.
    """

    path: Path
    page: Path
    record: Deployment
    did: tuple[str, ...]
    next: str

    @property
    def ok(self) -> bool:
        """Whether the validation, if there was one, found nothing."""
        return self.record.validated is None or self.record.validated.ok


@paths_checked
def deploy_plan(model: str | os.PathLike[str], target: str, **asked: Any) -> DeployPlan:
    """What `deploy` would do; nothing is written.

    Args:
        model: a checkpoint's folder, or ``3b`` or ``7b``, the published sizes, which need no files.
        asked: as of `deploy`: ``recipe``, ``max_context``, ``goal``, ``jetpack``.

    Raises:
        as `deploy`.
    """
    name = os.fspath(model)
    if not (name in PUBLISHED or Path(name).is_dir()):
        raise CheckpointError(
            f"{name} is no folder, and a plan downloads nothing: give a checkpoint's folder, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    _refuse_bundle(name)
    return plan_deployment(find_model(name), Asked(target, **asked))


@paths_checked
def deploy(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: str,
    *,
    recipe: str | None = None,
    max_context: int | None = None,
    goal: str = "quality",
    jetpack: str | None = None,
    data: str | os.PathLike[str] | None = None,
    validation: str = "quick",
    said: Callable[[DeployPlan], None] | None = None,
    progress: Progress | None = None,
) -> DeployReport:
    """Make a bundle for a device, and its engines where their builder needs no GPU.

    An interrupted call leaves a folder ``.NAME.deploy`` beside ``out``; the next one of the same goes on from it.

    Args:
        model: checkpoint's folder, Hugging Face id, or ``modelscope:ID``; not a bundle.
        out: bundle folder. A bundle that is there is replaced.
        target: a machine of ``omniport targets``, ``this`` or ``cpu``.
        recipe: a precision or recipe of ``omniport plan``; chosen if None.
        max_context: tokens of the KV caches; chosen if None.
        goal: ``quality``, ``speed`` or ``memory``: what recipes are chosen by.
        jetpack: release that a Jetson board has; the oldest that exists for it if None.
        data: JSON lines to calibrate with; a built-in set if None.
        validation: ``quick`` or ``none``.
        said: called with the plan before anything is made.
        progress: called with the stage, and thousandths done and in all.

    Raises:
        UsageError: no such target, recipe or goal; a recipe that the target cannot have, a bundle in place of a
            checkpoint, or another deployment to ``out`` at work.
        CheckpointError: the checkpoint is unusable.
        ExportError: ``out`` holds something else or cannot be written, or there is no room on the disk.
        CheckFailed: a calibration or a first reply with values that are not finite.
    """
    asked = Asked(target, recipe, max_context, goal, jetpack)
    asked.check()
    if validation not in VALIDATIONS:
        raise UsageError(f"--validate {validation}: expected {' or '.join(VALIDATIONS)}")
    samples = None if data is None else Path(data)
    if samples is not None and not samples.is_file():
        raise UsageError(f"--data {samples}: no such file; JSON lines with messages were expected")
    _refuse_bundle(os.fspath(model))
    if os.fspath(model) in PUBLISHED and not Path(model).exists():
        raise UsageError(f"{model} names a size, without weights: give a checkpoint, such as Qwen/Qwen2.5-Omni-3B")
    ckpt, out = Checkpoint.open(model), Path(out)
    if ckpt.packed:
        raise UsageError(
            f"{ckpt.name} holds packed INT4 weights, and rounding twice adds up: deploy the model that it was made "
            "from, or export it as it is (omniport export --zero-points separate) and build that bundle"
        )
    previous_manifest(out)
    key = json_key(msgspec.to_builtins(asked.__dict__), _data_key(samples), _code_key(source_key(ckpt)))
    run = _Run(model, ckpt, out, key, samples, validation)
    finished = run.finished()
    if finished is not None:
        return run.report(finished)
    with deploy_work(out) as work:
        record = run.begin(work, asked)
        if said is not None:
            said(record.plan)
        record = run.go(work, record, progress)
    return run.report(record)


@dataclass
class _Run:
    """One call of `deploy`."""

    model: str | os.PathLike[str]
    ckpt: Checkpoint
    out: Path
    key: str
    data: Path | None
    validation: str
    did: list[str] = field(default_factory=list)

    def finished(self) -> Deployment | None:
        """The record at OUT, if all that is asked for is done and in place."""
        record = self._placed(find_record(self.out))
        return None if record is None or any(self._left(record)) else record

    def begin(self, work: DeployWork, asked: Asked) -> Deployment:
        """What was done before; or a plan, and room on the disk for it."""
        found = self._placed(find_record(self.out))
        left = work.claim(self.key)
        if found is not None:
            return found
        if left is None or left.manifest:
            shape = shape_of_config(read_json(self.ckpt.path / "config.json"), self.ckpt.name)
            plan = plan_deployment(shape, asked) if left is None else left.plan
            left = self._placed(left) or Deployment(key=self.key, plan=plan)
        if not left.manifest and not work.calibration.exists():
            left = msgspec.structs.replace(left, stages={})
        check_space(self.out, left.plan.expected.peak_disk_bytes - work.disk_bytes(), "deployment")
        work.save(left)
        return left

    def go(self, work: DeployWork, record: Deployment, progress: Progress | None) -> Deployment:
        """Carry out what is left, and keep the record after each stage."""
        left = list(self._left(record))
        shares = {name: _SHARES[name] for name in left}
        whole = WholeProgress(progress, shares, list(record.plan.expected.weights))
        for name in left:
            meter = Meter(work, whole.stage(name, name in _BY_PART))
            meter.progress("begins", 0, 1)
            record = getattr(self, f"_{name}")(work, record, meter)
            record = msgspec.structs.replace(record, stages=record.stages | {name: meter.figures()})
            self.did.append(name)
            work.save(record)
        write_record(self.out, record)
        replace_file(self.out / PAGE_FILE, render(record).encode())
        return record

    def report(self, record: Deployment) -> DeployReport:
        """What the caller gets."""
        return DeployReport(self.out, self.out / PAGE_FILE, record, tuple(self.did), next_line(self.out, record))

    def _placed(self, record: Deployment | None) -> Deployment | None:
        """The record of this deployment if the bundle that it tells of is at OUT."""
        if record is None or record.key != self.key or not record.manifest:
            return None
        try:
            bundle = Bundle.open(self.out)
        except BundleError:
            return None
        return record if sha256_of(bundle.root / MANIFEST_FILE) == record.manifest else None

    def _left(self, record: Deployment) -> Iterator[str]:
        """Stages that are not finished."""
        plan = record.plan
        if not record.manifest:
            made = ("calibrate", "graphs", "bundle") if plan.quantized else ("graphs", "bundle")
            yield from (name for name in made if name not in record.stages)
        if self.validation != "none" and record.validated is None:
            yield "validate"
        if plan.built_here and plan.builder in packages.installed() and not record.engines:
            yield "engines"
        if plan.target == CPU and record.reply is None:
            yield "reply"

    def _calibrate(self, work: DeployWork, record: Deployment, meter: Meter) -> Deployment:
        if work.calibration.exists():
            return record
        from .calibration.sample_data import write_samples
        from .calibrator import calibrate

        data = self.data
        if data is None:
            data = work.folder / "samples" / "calib.jsonl"
            if not data.exists():  # it is written last
                remove_folder(data.parent)
                write_samples(data.parent)
        calibrate(self.model, data, work.calibration, graphs=record.plan.calibrated, progress=meter.progress)
        return record

    def _graphs(self, work: DeployWork, record: Deployment, meter: Meter) -> Deployment:
        export = plan_graphs(self.model, record.plan, work, self.out)
        make_graphs(export, record.plan, _calibration(work, record), work, meter)
        return record

    def _bundle(self, work: DeployWork, record: Deployment, meter: Meter) -> Deployment:
        export = plan_graphs(self.model, record.plan, work, self.out)
        calibration = _calibration(work, record)
        kept = make_graphs(export, record.plan, calibration, work, meter)
        assemble(export, record.plan, calibration, kept, work, meter.progress)
        meter.look()
        written = {name: sum(file.size for file in found.files.values()) for name, found in kept.items()}
        manifest = sha256_of(self.out / MANIFEST_FILE)
        record = msgspec.structs.replace(record, manifest=manifest, written=written)
        work.save(record)
        work.drop_graphs()
        return record

    def _validate(self, work: DeployWork, record: Deployment, meter: Meter) -> Deployment:
        from omniport.export.validation.types import FAIL, NOT_RUN
        from omniport.export.validation.validate import validate

        report, _ = validate(self.out, self.model, suite=self.validation, progress=meter.progress)
        found = Validated(
            suite=self.validation,
            ok=report.ok,
            checks=len(report.checks),
            failed=tuple(f"{check.stage}: {check.name}" for check in report.checks if check.status == FAIL),
            not_run=sum(check.status == NOT_RUN for check in report.checks),
        )
        return msgspec.structs.replace(record, validated=found)

    def _engines(self, work: DeployWork, record: Deployment, meter: Meter) -> Deployment:
        from omniport.export.tensorrt.build import build_engines

        built = build_engines(self.out, record.plan.target, progress=meter.progress)
        engines = tuple(
            Engine(
                graph=row.graph,
                engine_bytes=row.record.engine.size,
                build_seconds=row.record.build_seconds,
                peak_memory_bytes=row.record.peak_memory_bytes,
            )
            for row in built.graphs
        )
        return msgspec.structs.replace(record, engines=engines)

    def _reply(self, work: DeployWork, record: Deployment, meter: Meter) -> Deployment:
        return msgspec.structs.replace(record, reply=measure_alone(self.out, "ort-cpu"))


def next_line(out: Path, record: Deployment) -> str:
    """The command that builds what is missing, checks and starts the bundle, on the machine that it is for."""
    return f"omniport start {out}" if record.plan.target in (CPU, "this") else f"omniport start {out.name}"


def _calibration(work: DeployWork, record: Deployment) -> Calibration | None:
    return Calibration.load(work.calibration) if record.plan.quantized else None


def _refuse_bundle(model: str) -> None:
    if (Path(model) / MANIFEST_FILE).exists():
        raise UsageError(
            f"{model} is a bundle, which is exported already: deploy begins with a checkpoint. For this bundle use "
            "omniport quantize, omniport build and omniport talk"
        )


def _code_key(source: str) -> str:
    return json_key(source, importlib.metadata.version("omniport"), tracing_key("models", "graphs", "checkpoint"))


def _data_key(data: Path | None) -> str:
    """sha256 over a data file's lines, and size and time of the files that they name."""
    lines = [] if data is None else read_lines(data)
    named: set[tuple[str, int, int]] = set()
    for _, line in lines:
        try:
            values = list(_strings(json.loads(line)))
        except (ValueError, RecursionError):
            continue  # calibrate says which line, and why
        for path in map(Path(data or "").parent.joinpath, values):
            with suppress(OSError, ValueError):  # most are no names of files
                found = path.stat()
                named.add((str(path), found.st_size, found.st_mtime_ns))
    return json_key(lines, sorted(named))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
