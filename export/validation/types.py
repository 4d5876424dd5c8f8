"""Types of a validation: checks, and the report that holds them (docs/validate.md describes the JSON)."""

from __future__ import annotations

import msgspec
from omniport.runtime.errors import CheckpointError

REPORT_SCHEMA_VERSION = 1

PASS, FAIL, NOT_RUN = "pass", "fail", "not_run"


class NoChatTemplate(CheckpointError):
    """The checkpoint has no chat template: checks that compare prompts cannot run."""


class Check(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One comparison with the reference.

    Attributes:
        stage: what is at fault when it fails: a graph's name, ``preprocess``, ``positions``, ``conditioning``,
            ``solver``, ``end_to_end`` or ``speech``.
        name: what is compared and on what input; unique within the stage.
        status: ``pass``, ``fail`` or ``not_run``.
        figures: measured values.
        limits: for the figures that decide, the value that is still allowed; ``reasons`` says why.
        reasons: figure -> why its limit is what it is.
        message: for a failure, what differs and where first; for ``not_run``, why.
        artifacts: role -> name of an array kept for the report's plots and players.
    """

    stage: str
    name: str
    status: str
    figures: dict[str, float | int | bool | str | None] = {}
    limits: dict[str, float] = {}
    reasons: dict[str, str] = {}
    message: str = ""
    artifacts: dict[str, str] = {}

    @classmethod
    def failed(cls, stage: str, name: str, message: str) -> Check:
        """A check that failed before any figure was computed."""
        return cls(stage=stage, name=name, status=FAIL, message=message)

    @classmethod
    def not_run(cls, stage: str, name: str, message: str) -> Check:
        """A check that could not run; ``message`` says why."""
        return cls(stage=stage, name=name, status=NOT_RUN, message=message)


class ValidationReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A whole run. ``ok``: no check failed, at least one ran, and no graph went without a check that ran."""

    schema_version: int = REPORT_SCHEMA_VERSION
    ok: bool
    bundle: str
    checkpoint: str
    fingerprint: str
    backend: str
    precision: str
    emulated: list[str] = []
    """graphs that ran as an emulation copy (BF16 on a CPU)"""
    suite: str
    checks: list[Check]
    environment: dict[str, str]
    hashes: dict[str, str]
    """sha256 of every graph file"""
    seconds: float
    peak_memory_bytes: int
