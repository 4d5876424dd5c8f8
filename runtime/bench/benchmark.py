"""Run a benchmark stage by stage, alternating with the reference, and measure the machine beside it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend
from ..backends.registry import open_backend
from ..bundle.manifest import SolverSpec
from ..bundle.parts import giving
from ..bundle.reader import Bundle
from ..errors import UsageError
from ..speech.kept_blocks import nothing_before
from ..speech.ode import solve, with_method
from ..speech.ode_methods import METHODS
from ..system.host import physical_cores, resident_memory
from ..system.progress import Progress
from ..system.rates import Clock
from .reply_timing import measure_reply
from .results import REPLY, BenchReport, Figure, Machine, StageResult, Work, measured_parts, merged
from .roofline import (
    CLOCKS,
    Profile,
    alternate,
    environment,
    measure_machine,
    profile_run,
    ratio_of,
    spread,
    weight_bytes,
)
from .workloads import Job, Rival, Sizes, stage_jobs

#: two programs that do the same differ by the order of sums only; INT4 weights differ more than that
_SAME = 0.5
#: what runs graphs on a CPU
BACKENDS = ("ort-cpu", "openvino")
_REPLY_ROUNDS = 3


def bench(
    root: str | Path,
    stages: Sequence[str] = (),
    *,
    rival: Callable[[Bundle], Rival] | None = None,
    sizes: Sizes | None = None,
    rounds: int = 5,
    threads: int | None = None,
    clock: str = "wall",
    backend: str = BACKENDS[0],
    compute: str | None = None,
    before: BenchReport | None = None,
    keep: Callable[[BenchReport], None] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure a bundle on this machine's CPU.

    Args:
        stages: those of `measured_parts`, and ``reply``; all that the bundle has graphs for if none are named.
        rival: opens what each stage is measured beside.
        sizes: of inputs. rounds: of each figure; whole replies are measured in fewer.
        threads: of one operator, for both; the physical cores if None.
        clock: of `omniport.runtime.bench.roofline.CLOCKS`; ``cpu`` goes with one thread.
        backend: one of ``BACKENDS``. compute: as of ``OmniSession.open``.
        before: an earlier report, whose other stages the new one gets. keep: called with the report after each stage.
        progress: called with what is measured, and the number of stages done and in all.

    Raises:
        UsageError: an unknown stage, clock or backend, a stage that the bundle has no graph for, threads that the clock
            does not go with, fewer than one round, or a report of something else. Raised before anything is measured.
        BackendError: the backend is missing or cannot run the bundle, or onnxruntime is, which counts the operations.
    """
    _check(rounds, threads, clock, backend)
    bundle = Bundle.open(root)
    names = chosen_stages(bundle, stages)
    count = physical_cores() if threads is None else threads
    other = None if rival is None else rival(bundle)
    opened = partial(open_backend, backend, bundle, threads=count, compute=compute)
    run = _Run(bundle, count, rounds, sizes or Sizes(), other, CLOCKS[clock], opened)
    report = _nothing_measured(bundle, other, clock, backend, compute)
    if before is not None:
        report = merged(before, report)
    for done, name in enumerate(names):
        if progress is not None:
            progress(f"measuring {name}", done, len(names))
        stage = run.stage(name)
        report = merged(report, msgspec.structs.replace(report, stages={name: stage}))
        if keep is not None:
            keep(report)
        if other is not None:
            other.release()
        gc.collect()
    return report


def _nothing_measured(
    bundle: Bundle, rival: Rival | None, clock: str, backend: str, compute: str | None
) -> BenchReport:
    manifest = bundle.manifest
    return BenchReport(
        bundle=manifest.source.name,
        fingerprint=manifest.source.fingerprint,
        precision=manifest.precision,
        recipe=manifest.quantization.recipe if manifest.quantization is not None else "",
        against=rival.name if rival is not None else "",
        clock=clock,
        backend=backend,
        compute=compute or "",
        environment=environment(rival.libraries if rival is not None else ()),
        stages={},
    )


def _check(rounds: int, threads: int | None, clock: str, backend: str) -> None:
    if rounds < 1:
        raise UsageError(f"{rounds} rounds; at least 1 was expected")
    if clock not in CLOCKS:
        raise UsageError(f"there is no clock {clock!r}; known clocks: {', '.join(CLOCKS)}")
    if backend not in BACKENDS:
        raise UsageError(f"there is no backend {backend!r} of a CPU; known ones: {', '.join(BACKENDS)}")
    if clock == "cpu" and threads != 1:
        raise UsageError("the clock 'cpu' adds the time of all threads up: measure with one (--threads 1)")


def chosen_stages(bundle: Bundle, stages: Sequence[str]) -> list[str]:
    """Those named, or all that the bundle has graphs for, in the order in which they are run.

    Raises:
        UsageError: a stage that there is not.
    """
    known = (*measured_parts(), REPLY)
    unknown = [name for name in stages if name not in known]
    if unknown:
        raise UsageError(f"there is no stage {unknown[0]!r}; known stages: {', '.join(known)}")
    able = [name for name, part in measured_parts().items() if part.name in bundle.manifest.graphs]
    able += [REPLY] * bundle.manifest.speaks
    return [name for name in known if name in (stages or able)]


class _Run:
    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        rounds: int,
        sizes: Sizes,
        rival: Rival | None,
        clock: Clock,
        opened: Callable[[], Backend],
    ) -> None:
        self.bundle, self.threads, self.rounds, self.sizes, self.rival = bundle, threads, rounds, sizes, rival
        self.clock, self.opened = clock, opened

    def stage(self, name: str) -> StageResult:
        machine = measure_machine(self.threads, clock=self.clock)
        before = resident_memory()
        if name == REPLY:
            rounds = min(self.rounds, _REPLY_ROUNDS)
            figures, chunks = measure_reply(self.bundle, self.opened(), self.sizes, self.rival, rounds)
            return StageResult(machine=machine, threads=self.threads, figures=figures, chunks=chunks)
        if name == "solver":
            figures = _measure_solvers(self.bundle, self.opened(), self.sizes, self.rounds, self.clock)
            return StageResult(machine=machine, threads=self.threads, figures=figures)
        return self._graph_stage(name, machine, before)

    def _graph_stage(self, name: str, machine: Machine, before: int | None) -> StageResult:
        backend = self.opened()
        figures, resident = [], None
        jobs: list[Job] = []
        profile = Profile(0.0, {})
        for job in stage_jobs(name, self.bundle, backend, self.sizes):
            profile = profile_run(self.bundle, job.graph, self.threads, job.profiled)
            if resident is None:
                job.run()
                now = resident_memory()
                resident = None if now is None or before is None else now - before
            figure = self._figure(job, profile)
            assert figure.machine is not None
            machine = _better(machine, figure.machine)
            figures.append(figure)
            jobs.append(job)
        if len(jobs) > 1 and jobs[0].grows:
            figures[-1] = msgspec.structs.replace(figures[-1], values={"growth": self._growth(jobs[0], jobs[-1])})
        backend.close()
        return StageResult(
            machine=machine,
            threads=self.threads,
            figures=tuple(figures),
            resident_bytes=resident,
            operators=profile.seconds,
        )

    def _growth(self, short: Job, long: Job) -> float:
        """How many times as long a step takes at the longest context as at the shortest, in turns."""
        shorter, longer = alternate(short.run, long.run, self.rounds, clock=self.clock)
        return ratio_of(longer, shorter).median

    def _figure(self, job: Job, profile: Profile) -> Figure:
        runner = None if self.rival is None else self.rival.runner(job)
        difference = None if runner is None else _difference(job, job.run(), runner())
        before = measure_machine(self.threads, clock=self.clock)
        ours, theirs = alternate(job.run, runner, self.rounds, clock=self.clock)
        machine = _better(before, measure_machine(self.threads, clock=self.clock))
        moved = weight_bytes(self.bundle, job.graph) + job.cache_bytes
        work = Work(operations=profile.operations, bytes=float(moved))
        least = max(work.operations / machine.matmul_rate, work.bytes / machine.read_bandwidth)
        seconds = spread(ours)
        return Figure(
            name=job.name,
            size=job.size,
            of=job.of,
            count=job.count,
            unit=job.unit,
            seconds=seconds,
            work=work,
            machine=machine,
            roofline_seconds=least,
            share=least / seconds.median,
            reference=spread(theirs) if theirs else None,
            faster=ratio_of(theirs, ours) if theirs else None,
            difference=difference,
        )


def _better(one: Machine, other: Machine) -> Machine:
    """The higher of both rates: what a machine was seen to reach, just before or just after."""
    return msgspec.structs.replace(
        one,
        read_bandwidth=max(one.read_bandwidth, other.read_bandwidth),
        matmul_rate=max(one.matmul_rate, other.matmul_rate),
    )


def _difference(job: Job, ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Relative RMS of the two: a race between programs that do different things says nothing.

    Raises:
        UsageError: they do not do the same.
    """
    wanted = theirs.astype(np.float64).reshape(-1)
    got = ours.astype(np.float64).reshape(-1)
    energy = float(np.sqrt(np.mean(wanted**2)))
    off = float(np.sqrt(np.mean((got - wanted) ** 2))) / energy if got.shape == wanted.shape and energy else np.inf
    if not off < _SAME:
        raise UsageError(
            f"{job.stage} {job.name}: this bundle and what it is measured against give different results (relative "
            f"RMS {off:.2g}); give --against the checkpoint that the bundle was exported from"
        )
    return off


def _measure_solvers(bundle: Bundle, backend: Backend, sizes: Sizes, rounds: int, clock: Clock) -> tuple[Figure, ...]:
    """Every mode over the same codes and noise: seconds, and the mel's distance from ``rk4``.

    ``mel_distance``: RMS of the difference over RMS of the mel about its mean. ``mel_error_db``: RMS of the difference
    in dB of amplitude, which is what a log-mel is measured in.
    """
    count = min(sizes.codes)
    spec = bundle.manifest.solver
    assert spec is not None
    mels: dict[str, NDArray[np.float32]] = {}
    figures = []
    for mode in METHODS:
        try:
            schedule = with_method(spec, mode)
        except UsageError:  # a bundle of an earlier release, whose DiT lacks this mode's time points
            continue

        def run(mode: str = mode, schedule: SolverSpec = schedule) -> None:
            mels[mode] = _mel(bundle, backend, schedule, count)

        seconds, _ = alternate(run, None, rounds, 0, clock=clock)
        figures.append(
            Figure(
                name=mode,
                size=count,
                of="codes",
                count=1,
                unit="solution",
                seconds=spread(seconds),
                values={"evaluations": sum(map(len, schedule.stages))} | _distance(mels[mode], mels["rk4"]),
            )
        )
    return tuple(figures)


def _distance(mel: NDArray[np.float32], wanted: NDArray[np.float32]) -> dict[str, float]:
    rms = float(np.sqrt(np.mean((mel - wanted).astype(np.float64) ** 2)))
    return {"mel_distance": rms / float(np.std(wanted.astype(np.float64))), "mel_error_db": rms * 20 / math.log(10)}


def _mel(bundle: Bundle, backend: Backend, schedule: SolverSpec, count: int) -> NDArray[np.float32]:
    """Mel frames of fixed codes and noise."""
    geometry = bundle.manifest.dit
    assert geometry is not None
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {
        "codes": rng.integers(0, geometry.num_embeds, (1, count)),
        **bundle.voice().feeds(),
        **nothing_before(geometry),
    }
    noise = rng.standard_normal((1, count * geometry.repeats, geometry.mel_dim), np.float32)
    graph = backend.graph(giving("velocity").name)

    def velocity(step: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return graph.run({**feeds, "x": x, "step": np.asarray([step], np.int64)})["velocity"]

    return solve(schedule, velocity, noise)
