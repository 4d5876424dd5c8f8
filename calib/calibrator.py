"""Calibrate a checkpoint: run samples through every part in FP32, and write what was observed to OUT.calib."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import UsageError
from omniport.runtime.system.files import write_output
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Progress

from .calibration.calibrate_parts import Job, Stages
from .calibration.checkpoint_source import Source
from .calibration.dataset import read_samples
from .calibration.work_dir import SOURCE, work_folder
from .calibration_file import Calibration, Header, Site

#: what a finished step looks like; raised when steps of an older release are of no use any more
_WORK_VERSION = 2


@dataclass(frozen=True)
class CalibrateReport:
    """What a calibration found.

    Attributes:
        path: of the file.
        resumed: it went on where an interrupted run had stopped.
        missing: parts that no sample reached.
    """

    path: Path
    calibration: Calibration
    resumed: bool
    missing: tuple[str, ...]


@paths_checked
def calibrate(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    samples: int | None = None,
    seed: int = 0,
    max_codes: int = 150,
    graphs: Collection[str] | None = None,
    progress: Progress | None = None,
) -> CalibrateReport:
    """Calibrate a checkpoint and write ``out``.

    An interrupted run leaves a folder ``.NAME.work`` beside ``out``; the next one with the same checkpoint, data and
    options goes on from it, any other starts anew.

    Args:
        checkpoint: folder, Hugging Face id, or ``modelscope:ID``.
        data: JSON lines with ``messages``, and ``reply`` where the sample is to be spoken.
        samples: how many lines to take; all if None.
        seed: of the codec tokens that are sampled and of the DiT's noise.
        max_codes: codec tokens of a sample's speech at most.
        graphs: those that a calibration is wanted of, all if None: what a recipe rounds none of need not be run.
        progress: called with the stage, and what is done of how much.

    Raises:
        CheckpointError: the checkpoint is unusable.
        UsageError: bad data (names the line), no such graph, or ``out`` cannot be written.
        CheckFailed: a value that is not finite; names the layer.
    """
    report = progress or (lambda *_: None)
    data, out = Path(data), Path(out)
    _check(data, out)
    with work_folder(out) as work:
        report("reading checkpoint and data", 0, 1)
        source = Source.open(checkpoint, work.folder / SOURCE)
        wanted = _wanted(source, graphs)
        rows = read_samples(data, source.manifest, source.codec, samples)
        if any(PARTS[name].speaks for name in wanted) and not any(row.reply for row in rows):
            raise UsageError(
                f'no sample of {data} has a "reply", so talker, DiT and vocoder could not be calibrated; give at least '
                'one line a "reply"'
            )
        header = Header(
            fingerprint=source.ckpt.fingerprint,
            data=hashlib.sha256("".join(row.digest for row in rows).encode()).hexdigest(),
            samples=len(rows),
            seed=seed,
            created_by={name: _version(name) for name in ("omniport", "nvidia-modelopt", "torch")},
            graphs={},
        )
        resumed = work.claim(_key(header, max_codes))
        stages = Stages(Job(source, rows, work, seed, max_codes, report, wanted))
        stages.run()
        calibration = _gather(header, wanted, stages)
        report("writing", 0, 1)
        write_output(out, calibration.encode())
    missing = tuple(name for name in wanted if name not in calibration.graphs)
    return CalibrateReport(out, calibration, resumed, missing)


def _check(data: Path, out: Path) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file to write, such as {out / 'model.calib'}")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent} is not a folder; make it first, or choose another place")
    if not data.is_file():
        raise UsageError(
            f"{data} is not a file. JSON lines with messages were expected; omniport calibrate --sample-data DIR "
            "writes a small set"
        )


def _key(header: Header, max_codes: int) -> dict[str, object]:
    """What a step that was finished before must have been made from."""
    return {
        "version": _WORK_VERSION,
        "fingerprint": header.fingerprint,
        "data": header.data,
        "seed": header.seed,
        "max_codes": max_codes,
        "created_by": header.created_by,
    }


def _wanted(source: Source, graphs: Collection[str] | None) -> list[str]:
    """Graphs of the checkpoint that a calibration is wanted of, in their order."""
    there = list(source.definitions)
    if graphs is None:
        return there
    unknown = [name for name in graphs if name not in there]
    if unknown or not graphs:
        raise UsageError(f"no graph {', '.join(unknown) or 'is named'}: {source.ckpt.name} has {', '.join(there)}")
    return [name for name in there if name in graphs]


def _gather(header: Header, wanted: Sequence[str], stages: Stages) -> Calibration:
    graphs: dict[str, tuple[Site, ...]] = {}
    for name in wanted:
        found = tuple(stages.findings(name).load())
        if found:
            graphs[name] = found
    records = {name: tuple(site.record for site in sites) for name, sites in graphs.items()}
    return Calibration(msgspec.structs.replace(header, graphs=records), graphs)


def _version(package: str) -> str:
    return importlib.metadata.version(package)
