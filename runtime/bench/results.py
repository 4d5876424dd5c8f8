"""The benchmark report: the file that ``omniport bench --json`` writes (schema in docs/bench.md).

A file holds one result for each stage. Measuring a stage again replaces it and leaves the others, so that long
benchmarks can be made in pieces; what a stage is judged by was therefore measured with it and lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..bundle.parts import PARTS, Part
from ..errors import UsageError
from ..system.files import read_file, write_output

SCHEMA = 1

#: the stage that measures a whole spoken reply
REPLY = "reply"

#: ratios of one run differ by as much between runs on a shared machine of two cores
BAND = 0.25


def measured_parts() -> dict[str, Part]:
    """Stage -> the part that it measures, in the order in which they are run; `REPLY` comes last."""
    return {stage: part for part in PARTS.values() for stage in part.benchmarks or (part.name,)}


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Spread of one quantity over all rounds, warm-up apart: seconds, or a ratio of seconds."""

    median: float
    low: float
    high: float
    runs: int


class Work(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one run has to do at the least.

    Attributes:
        operations: multiplications and additions of products, convolutions and attention.
        bytes: weights, each read once, and the live part of the KV cache.
    """

    operations: float
    bytes: float


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rates measured beside a figure, the best of them for a stage: bytes read and operations of a matrix product, a
    second; processes waiting."""

    read_bandwidth: float
    matmul_rate: float
    load_average: float | None


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One measurement.

    Attributes:
        name: unique in its stage. size: of its input, in ``of``.
        count: how many of ``unit`` one run makes, so that ``count / seconds.median`` is the rate.
        seconds: of one run.
        machine: its rates next to this figure, the better of before and after.
        roofline_seconds: what the work takes at these rates; ``share`` is that over the median.
        reference: seconds of the same run by what it was compared with; ``faster`` is their ratio round by round.
        difference: relative RMS of the two outputs.
        values: further figures by name, with their unit in the name.
    """

    name: str
    size: int
    of: str
    count: float
    unit: str
    seconds: Timing
    work: Work | None = None
    machine: Machine | None = None
    roofline_seconds: float | None = None
    share: float | None = None
    reference: Timing | None = None
    faster: Timing | None = None
    difference: float | None = None
    values: dict[str, float] = {}

    @property
    def rate(self) -> float:
        """``unit`` a second."""
        return self.count / self.seconds.median


class StageResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage.

    Attributes:
        threads: of one operator.
        resident_bytes: growth of the process's memory by loading and running it; None where the system does not tell.
        operators: seconds of one run by operator, largest first, of the largest input.
        chunks: the streamed reply: when each piece of sound was ready, and for how long it plays.
    """

    machine: Machine
    threads: int
    figures: tuple[Figure, ...]
    resident_bytes: int | None = None
    operators: dict[str, float] = {}
    chunks: tuple[tuple[float, float], ...] = ()


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What it ran on. ``versions``: of omniport and the libraries that took part."""

    processor: str
    cores: int
    memory_bytes: int | None
    system: str
    versions: dict[str, str]


class BenchReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that was measured of one bundle.

    Attributes:
        bundle: name of the checkpoint it was made from. fingerprint: of that checkpoint.
        precision: of the bundle. recipe: of its quantization; empty without.
        against: what it was compared with; empty without.
        clock: ``wall``, or ``cpu``: processor time on one thread. Whole replies are always wall time.
        backend: what ran the graphs. compute: what it computed in; empty: as the graphs say.
    """

    schema: int = SCHEMA
    bundle: str
    fingerprint: str
    precision: str
    recipe: str = ""
    against: str = ""
    clock: str = "wall"
    backend: str = "ort-cpu"
    compute: str = ""
    environment: Environment
    stages: dict[str, StageResult] = {}

    def figure(self, stage: str, name: str) -> Figure:
        """The figure of that name.

        Raises:
            KeyError: it was not measured.
        """
        for figure in self.stages[stage].figures if stage in self.stages else ():
            if figure.name == name:
                return figure
        raise KeyError(f"{stage}: {name}")


def read_report(path: Path) -> BenchReport:
    """A report from a file.

    Raises:
        UsageError: there is none, it is no report, or its schema is another.
    """
    try:
        report = msgspec.json.decode(read_file(path, 64 << 20), type=BenchReport)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}. Give a file that 'omniport bench --json' wrote") from (
            error
        )
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{path} is no result of 'omniport bench' that this release reads ({error}). Give another "
            "name, or delete it"
        ) from error
    if report.schema != SCHEMA:
        raise UsageError(f"{path} has schema {report.schema}; this release reads {SCHEMA}. Measure again")
    return report


def merged(before: BenchReport, now: BenchReport) -> BenchReport:
    """``now`` with the stages of ``before`` that it does not have.

    Raises:
        UsageError: they are not of the same bundle, machine and kind.
    """
    same = ("fingerprint", "precision", "recipe", "against", "clock", "backend", "compute")
    differing = [name for name in same if getattr(before, name) != getattr(now, name)]
    if before.environment.processor != now.environment.processor:
        differing.append("processor")
    if differing:
        raise UsageError(
            f"the file's results differ from these in {', '.join(differing)}; results of one bundle, machine and "
            "reference go into one file. Give another file"
        )
    stages = before.stages | now.stages
    ordered = {name: stages[name] for name in (*measured_parts(), REPLY) if name in stages}
    return msgspec.structs.replace(now, stages=ordered)


def encode_report(report: BenchReport) -> bytes:
    """Indented JSON; numbers rounded to five digits."""
    plain = _rounded(msgspec.to_builtins(report))
    return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_report(path: Path, report: BenchReport) -> None:
    """Replace the file.

    Raises:
        UsageError: the folder is missing or cannot be written.
    """
    write_output(path, encode_report(report))


@dataclass(frozen=True)
class Change:
    """One ratio, then and now: ``times as fast`` or ``share`` of the roofline."""

    stage: str
    name: str
    what: str
    before: float
    now: float
    band: float

    @property
    def ok(self) -> bool:
        """Whether it lost less than the noise."""
        return self.now >= self.before * (1 - self.band)


def changes(before: BenchReport, now: BenchReport, band: float = BAND) -> list[Change]:
    """Ratios that both have. Times are not compared: they are another machine's, or another hour's."""
    rows = []
    for stage, result in now.stages.items():
        for figure in result.figures:
            try:
                known = before.figure(stage, figure.name)
            except KeyError:
                continue
            for what, (then, today) in _ratios(known, figure).items():
                if then is not None and today is not None:
                    rows.append(Change(stage, figure.name, what, then, today, band))
    return rows


def _ratios(before: Figure, now: Figure) -> dict[str, tuple[float | None, float | None]]:
    """Where there is a reference, it is the yardstick: it feels the same neighbours."""
    if before.faster is not None and now.faster is not None:
        return {"times as fast": (before.faster.median, now.faster.median)}
    return {"share of the roofline": (before.share, now.share)}
