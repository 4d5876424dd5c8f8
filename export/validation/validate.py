"""Run a validation: all groups of checks in order, one reference part and its graph in memory at a time."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from omniport.runtime.backends import BACKENDS, open_backend
from omniport.runtime.backends.base import Backend
from omniport.runtime.backends.select import open_auto
from omniport.runtime.bundle.parts import PARTS, decoders, speech_parts
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BundleError, UsageError, UserError
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.system.host import peak_memory
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress, Say

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import quiet_transformers
from ..evaluation.machine import environment, is_large, usable_threads
from ..models.module import torch_threads
from ..option_values import SUITES
from .context import Context, judged_as
from .low_memory_backend import LowMemoryBackend
from .reference import Reference
from .types import FAIL, NOT_RUN, Check, NoChatTemplate, ValidationReport

Artifacts = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Group:
    """One group of checks.

    Attributes:
        stage: what is at fault when the group itself breaks down.
        function: ``module.function`` below this package.
        part: groups that follow each other and share it keep the reference part and the graphs loaded.
        needs: graphs without which nothing can be checked.
        graphs: what the group is told to check; None for all that the bundle holds.
    """

    stage: str
    function: str
    part: str
    needs: tuple[str, ...] = ()
    graphs: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, context: Context) -> Iterator[Check]:
        module, _, name = self.function.partition(".")
        # imported here: a group may need packages that others do not
        function = getattr(importlib.import_module(f"{__package__}.checks.{module}"), name)
        yield from function(context, **self.options)


class Validation(NamedTuple):
    """What `validate` gives: the report, and the arrays that its checks name (waveforms, mels, ...)."""

    report: ValidationReport
    artifacts: Artifacts


@paths_checked
def validate(
    bundle: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    backend: str = "ort-cpu",
    compute: str | None = None,
    suite: str = "quick",
    graphs: Sequence[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    trace: str | None = None,
    asr: str | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Compare a bundle, and the whole conversation, with transformers.

    Args:
        bundle: bundle folder; every file's sha256 is compared first.
        checkpoint: the checkpoint it was exported from: folder, Hugging Face id or ``modelscope:ID``.
        backend: one of ``omniport.runtime.backends.BACKENDS``. One that cannot run here gives ``not_run`` checks.
        compute: as for ``OmniSession.open``; graphs that are computed so are judged by the limits of that dtype.
        suite: ``quick`` or ``full``.
        graphs: check these of `group_names` only; everything by default.
        data: JSON lines, each an object with ``messages``, to add to the end-to-end checks.
        trace: ``thinker`` or ``talker``: also compare its hidden states layer by layer.
        asr: command that prints the words it hears in the WAV file whose path it is given last.
        progress: called before each case.

    Raises:
        UsageError: wrong options, unusable ``data``, or a bundle that was exported from another checkpoint.
        BundleError, CheckpointError: bundle or checkpoint cannot be used.

    """
    started = time.perf_counter()
    _require_options(backend, suite, graphs, trace)
    told = progress or (lambda _line, _done, _total: None)
    opened = Bundle.open(bundle, verify=True, progress=lambda name, _d, _t: told(f"verify {name}", 0, 1))
    ckpt = Checkpoint.open(checkpoint)
    _require_same_source(opened, bundle, ckpt, checkpoint)
    _require_inputs(opened, data, asr)
    plan = _Plan(opened, ckpt, suite, _groups(graphs, data, trace, asr), usable_threads(opened))
    loaded, artifacts = _Loaded(plan, backend, compute), Artifacts()
    with quiet_transformers(), torch_threads(plan.threads):
        checks = _run(plan, loaded, artifacts, told)
    manifest = opened.manifest
    report = ValidationReport(
        ok=_proven(checks, [name for name in manifest.graphs if graphs is None or name in graphs]),
        bundle=os.fspath(bundle),
        checkpoint=ckpt.name,
        fingerprint=ckpt.fingerprint,
        backend=loaded.backend_name,
        precision=manifest.precision,
        emulated=sorted(loaded.emulated, key=list(PARTS).index),
        suite=suite,
        checks=checks,
        environment=environment(plan.threads),
        hashes={f: manifest.files[f].sha256 for g in manifest.graphs.values() for f in (g.file, *g.data)},
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory() or 0,
    )
    return Validation(report, artifacts)


@dataclass(frozen=True)
class _Plan:
    """The checks that will run."""

    bundle: Bundle
    checkpoint: Checkpoint
    suite: str
    groups: Sequence[_Group]
    threads: int

    @property
    def held(self) -> tuple[str, ...]:
        """The graphs of the bundle, in the order of the parts."""
        return tuple(name for name in PARTS if name in self.bundle.manifest.graphs)


def _run(plan: _Plan, loaded: _Loaded, artifacts: Artifacts, told: Progress) -> list[Check]:
    """Run the groups in order, with one part loaded at a time."""
    checks, part, total = list[Check](), "", len(plan.groups)
    for i, group in enumerate(plan.groups):
        if group.part != part:
            loaded.release()
            part = group.part
        told(group.stage, i, total)
        checks += _group_checks(plan, group, loaded, artifacts, _placed(told, i, total))
    loaded.release()
    told("done", total, total)
    return checks


def _placed(told: Progress, done: int, total: int) -> Say:
    return lambda line: told(line, done, total)


def _group_checks(plan: _Plan, group: _Group, loaded: _Loaded, artifacts: Artifacts, say: Say) -> list[Check]:
    missing = [name for name in group.needs if name not in plan.held]
    if missing:
        return [_not_run(group, f"the bundle holds no {', '.join(missing)}")]
    try:
        backend = loaded.open_backend()
    except BackendError as error:
        return [_not_run(group, str(error))]
    context = Context(
        bundle=plan.bundle,
        checkpoint=plan.checkpoint,
        backend=backend,
        reference=loaded.reference,
        suite=plan.suite,
        graphs=plan.held if group.graphs is None else group.graphs,
        precision={
            name: judged_as(spec.precision, loaded.compute) for name, spec in plan.bundle.manifest.graphs.items()
        },
        progress=say,
        artifacts=artifacts,
        threads=plan.threads,
    )
    checks: list[Check] = []
    try:
        for check in group.run(context):
            check.figures = {key: _plain(value) for key, value in check.figures.items()}
            check.limits = {key: float(value) for key, value in check.limits.items()}
            checks.append(check)
    except NoChatTemplate as error:
        checks.append(_not_run(group, str(error)))
    except Exception as error:
        # BackendError and BundleError tell what a graph did, the other user errors what was asked for
        if isinstance(error, UserError) and not isinstance(error, BackendError | BundleError):
            raise
        checks.append(_broken(group, error))
    return checks or [_not_run(group, "the group gave no checks")]


class _Loaded:
    """The reference part and the backend that are in memory."""

    def __init__(self, plan: _Plan, backend: str, compute: str | None) -> None:
        self.bundle, self.threads, self.compute = plan.bundle, plan.threads, compute
        self.backend_name = self._asked = backend
        self.emulated: set[str] = set()
        self.reference = Reference(plan.checkpoint)
        self._backend: Backend | None = None

    def open_backend(self) -> Backend:
        """The backend asked for, opened if it is not.

        Raises:
            BackendError: it cannot run here.
        """
        if self._backend is None:
            self._backend = self._new_backend()
            self.backend_name = self._backend.name
        return self._backend

    def _new_backend(self) -> Backend:
        backend = self._open_whole()
        if not backend.name.startswith(("ort-cpu", "openvino")) or not is_large(self.bundle):
            return backend
        backend.close()
        return LowMemoryBackend(self._open_whole)

    def _open_whole(self) -> Backend:
        """The backend asked for, with emulation copies where this machine cannot run the graphs as they are."""
        if self._asked == "auto" and self.compute is None:
            return open_auto(self.bundle, self.threads, self._emulate)
        if self._asked == "ort-cpu" and self.compute is None:
            return self._emulate(self.bundle, self.threads)
        return open_backend(self._asked, self.bundle, threads=self.threads, compute=self.compute)

    def _emulate(self, bundle: Bundle, threads: int | None) -> Backend:
        from ..evaluation.half_emulation import EmulatedBackend

        backend = EmulatedBackend(bundle, threads=threads)
        self.emulated |= set(backend.emulated)
        return backend

    def release(self) -> None:
        """Release everything."""
        self.reference.release()
        if self._backend is not None:
            self._backend.close()
            self._backend = None


def group_names() -> tuple[str, ...]:
    """What ``graphs`` may name: each of these is one or two groups of checks.

    ``acceptance`` is not part of everything: it is for the real weights, and fetches two files.
    """
    return (*_everything(), "acceptance")


def _everything() -> tuple[str, ...]:
    return ("preprocess", "positions", *PARTS, "end_to_end", "speech")


def _groups(
    graphs: Sequence[str] | None, data: str | os.PathLike[str] | None, trace: str | None, asr: str | None
) -> list[_Group]:
    """Everything to run, in an order in which no part is loaded twice."""
    wanted = _everything() if graphs is None else tuple(graphs)
    groups = [
        _Group("preprocess", "preprocessing.preprocess_checks", "preprocess"),
        _Group("positions", "preprocessing.position_checks", "preprocess"),
    ]
    for name, part in PARTS.items():
        groups.append(_Group(name, "graphs.graph_checks", name, (name,), (name,)))
        if part.decodes:
            groups.append(_Group(name, "decoding.decode_checks", name, (name,), (name,)))
    hearing_and_seeing = tuple(name for name, part in PARTS.items() if not part.speaks)
    groups += [
        _Group(
            "end_to_end",
            "end_to_end.end_to_end_checks",
            "end_to_end",
            hearing_and_seeing,
            options={} if data is None else {"data": Path(data)},
        ),
        _Group(
            "speech",
            "speech.speech_checks",
            "speech",
            tuple(part.name for part in speech_parts() if not part.decodes),
            options={} if asr is None else {"asr": asr},
        ),
        _Group("acceptance", "acceptance.acceptance_checks", "end_to_end", needs=hearing_and_seeing),
    ]
    groups = [group for group in groups if group.stage in wanted]
    if trace is not None:
        groups.append(_Group(trace, "layer_trace.trace_layers", f"trace {trace}", (trace,), (trace,)))
    return groups


def _proven(checks: Sequence[Check], graphs: Sequence[str]) -> bool:
    """Nothing failed, something ran, and no graph that the bundle holds went without a check.

    A graph that did not load has only ``not_run`` checks: that is no failure of the graph, and no proof either.
    """
    ran = {check.stage for check in checks if check.status != NOT_RUN}
    return bool(ran) and ran.issuperset(graphs) and all(check.status != FAIL for check in checks)


def _plain(value: Any) -> Any:
    """A Python number for a numpy one, which JSON does not take."""
    return value.item() if isinstance(value, np.generic) else value


def _not_run(group: _Group, reason: str) -> Check:
    return Check.not_run(group.stage, _title(group), reason)


def _broken(group: _Group, error: Exception) -> Check:
    """A group that raised: a failure of its stage, and the checks it did not come to are missing from the report."""
    return Check.failed(group.stage, f"{_title(group)}: stopped by an error", f"{type(error).__name__}: {error}")


def _title(group: _Group) -> str:
    return group.function.rpartition(".")[2].replace("_", " ")


def _require_options(backend: str, suite: str, graphs: Sequence[str] | None, trace: str | None) -> None:
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}; known: {', '.join(BACKENDS)}")
    if suite not in SUITES:
        raise UsageError(f"no suite {suite!r}; known: {', '.join(SUITES)}")
    unknown = [name for name in graphs or () if name not in group_names()]
    if unknown:
        raise UsageError(f"nothing to check is named {', '.join(unknown)}; known: {', '.join(group_names())}")
    traceable = [part.name for part in decoders()]
    if trace is not None and trace not in traceable:
        raise UsageError(f"--trace {trace}: only {' and '.join(traceable)} can be traced layer by layer")


def _require_same_source(
    opened: Bundle, bundle: str | os.PathLike[str], ckpt: Checkpoint, checkpoint: str | os.PathLike[str]
) -> None:
    source = opened.manifest.source
    if source.fingerprint != ckpt.fingerprint:
        raise UsageError(
            f"{bundle} was exported from {source.name} with fingerprint {source.fingerprint[:12]}, and {checkpoint} "
            f"has {ckpt.fingerprint[:12]}. Give the checkpoint it was exported from, or export again"
        )


def _require_inputs(opened: Bundle, data: str | os.PathLike[str] | None, asr: str | None) -> None:
    """Read what is read only after minutes of work, so that a mistake there is found at once."""
    if data is not None:
        from ..evaluation.conversations import read_conversations

        manifest = opened.manifest
        codec = TextCodec.from_file(opened.path(manifest.tokenizer_file), manifest.tokens)
        read_conversations(Path(data), manifest, codec)
    if asr is not None:
        from .checks.asr import parse_command

        parse_command(asr)
