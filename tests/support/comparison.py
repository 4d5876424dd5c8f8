"""Comparisons of a bundle's graphs with its checkpoint, outside of a whole validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.evaluation.half_emulation import EmulatedBackend
from omniport.export.evaluation.metrics import MIN_ENERGY
from omniport.export.validation.context import Context
from omniport.export.validation.reference import Reference
from omniport.export.validation.types import PASS, Check
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Backend
from omniport.runtime.bundle.reader import Bundle


def context_of(
    bundle: Path, checkpoint: Path, graphs: Sequence[str] | None = None, backend: Backend | None = None
) -> Context:
    opened, ckpt = Bundle.open(bundle), Checkpoint.open(checkpoint)
    specs = opened.manifest.graphs
    if backend is None:
        brain = any(spec.precision == "bfloat16" for spec in specs.values())
        backend = EmulatedBackend(opened, threads=1) if brain else open_backend("ort-cpu", opened, threads=1)
    return Context(
        bundle=opened,
        checkpoint=ckpt,
        backend=backend,
        reference=Reference(ckpt),
        suite="quick",
        graphs=tuple(specs if graphs is None else graphs),
        precision={name: spec.precision for name, spec in specs.items()},
        progress=lambda line: None,
    )


def assert_all_pass(checks: Sequence[Check]) -> None:
    assert checks
    for check in checks:
        assert check.status == PASS, f"{check.stage} {check.name}: {check.message}"
        energy = check.figures["energy"]
        assert isinstance(energy, float)
        assert energy > MIN_ENERGY
        assert check.limits
        assert check.reasons.keys() == check.limits.keys()
    assert len({(check.stage, check.name) for check in checks}) == len(checks)
