"""deploy.json: what was planned for a device, and what was measured while it was made. Read on the device too."""

from __future__ import annotations

from pathlib import Path

import msgspec
from omniport.runtime.errors import UsageError
from omniport.runtime.system.files import read_file, replace_file

RECORD_FILE, PAGE_FILE = "deploy.json", "deploy.html"
SCHEMA_VERSION = 1
#: bytes of a record that are read at most
_MOST = 4 << 20


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``omniport plan`` predicts: bytes, seconds and rates."""

    memory_bytes: int
    usable_bytes: int
    build_bytes: int
    weights: dict[str, int]
    """graph -> bytes of its weights, as they are stored"""
    decode_tokens_per_second: float
    codes_per_second: float | None
    first_token_seconds: float
    first_audio_seconds: float | None
    work_per_second_of_speech: float | None
    real_time: bool
    solver: str
    """with which speech is made so fast; empty without speech"""
    peak_disk_bytes: int
    """in OUT and beside it, while it is made"""
    result_bytes: int
    """of the bundle"""


class DeployPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is going to be made, and why."""

    model: str
    target: str
    title: str
    """the target in words"""
    builder: str
    """``tensorrt-rtx`` or ``tensorrt``; empty where ONNX Runtime runs the graphs"""
    built_here: bool
    """whether this builder needs no GPU"""
    jetpack: str
    """release of a Jetson board that is planned for; empty for others"""
    goal: str
    recipe: str
    precision: str
    """of the export"""
    token2wav: str
    quantized: bool
    calibrated: tuple[str, ...]
    """graphs of which the recipe rounds weights"""
    context: int
    ops: str
    kv: str
    reasons: tuple[str, ...]
    refused: dict[str, str]
    """recipe -> why the target cannot have it"""
    expected: Expected


class StageFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A finished stage. ``peak_memory_bytes``: of the process up to its end; ``peak_disk_bytes``: during the stage."""

    seconds: float
    peak_memory_bytes: int
    peak_disk_bytes: int


class Validated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a validation in ONNX Runtime on the machine that deployed found."""

    suite: str
    ok: bool
    checks: int
    failed: tuple[str, ...]
    not_run: int


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine that was built here."""

    graph: str
    engine_bytes: int
    build_seconds: float
    peak_memory_bytes: int


class FirstReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A short spoken reply, measured on the machine that the bundle is for."""

    backend: str
    first_token_seconds: float
    first_audio_seconds: float | None
    seconds: float
    speech_seconds: float
    peak_memory_bytes: int

    @property
    def work_per_second(self) -> float | None:
        """Seconds of work for one of speech."""
        return self.seconds / self.speech_seconds if self.speech_seconds else None


class Deployment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """deploy.json."""

    format: str = "omniport-deploy"
    schema_version: int = SCHEMA_VERSION
    key: str
    """sha256 over checkpoint, data and what was asked for"""
    manifest: str = ""
    """sha256 of bundle.json; empty as long as there is none"""
    plan: DeployPlan
    stages: dict[str, StageFigures] = {}
    written: dict[str, int] = {}
    """graph -> bytes of its files"""
    validated: Validated | None = None
    engines: tuple[Engine, ...] = ()
    reply: FirstReply | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """Of the whole deployment."""
        return max((stage.peak_memory_bytes for stage in self.stages.values()), default=0)

    @property
    def peak_disk_bytes(self) -> int:
        """In OUT and beside it."""
        return max((stage.peak_disk_bytes for stage in self.stages.values()), default=0)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())


def find_record(folder: Path) -> Deployment | None:
    """The record in a folder; None where there is none that this release can read."""
    try:
        found = msgspec.json.decode(read_file(folder / RECORD_FILE, _MOST), type=Deployment)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    known = found.format == "omniport-deploy" and found.schema_version == SCHEMA_VERSION
    return found if known else None


def read_record(folder: Path) -> Deployment:
    """The record of a deployed bundle.

    Raises:
        UsageError: there is none.
    """
    found = find_record(folder)
    if found is None:
        raise UsageError(
            f"{folder} holds no {RECORD_FILE} that this release can read: it was not written by omniport deploy, or by "
            "another release. Deploy again, or use omniport build and omniport talk"
        )
    return found


def write_record(folder: Path, record: Deployment) -> None:
    """Write a record in one step.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(folder / RECORD_FILE, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
