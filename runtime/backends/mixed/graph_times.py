"""How long graphs take in ONNX Runtime and in OpenVINO on this machine, kept between sessions.

A file lies in the user's cache folder for the content of a bundle's graphs, both versions, the processor, the threads
and what is computed in. Anything else about the machine is expected to stay as it is: who changes it removes the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...bundle.reader import Bundle
from ...system import host
from ...system.files import cache_folder, path_lock, read_own_file, replacing

#: names of the backends that are compared
ORT, OPENVINO = "ort-cpu", "openvino"
#: in the cache folder
TIMES_FOLDER = "graph-times"
_MOST_BYTES = 1 << 20


class GraphTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What measuring one graph gave.

    Attributes:
        seconds: of the same work, by backend.
        difference: RMS of the difference between their outputs, as a share of the RMS of ONNX Runtime's.
        problem: why there are no seconds.
        budget: seconds that were too few; 0 where time was not the problem.
        busy: share of the processor that other processes took meanwhile, which makes the seconds doubtful.
        times: how often it was measured.
    """

    seconds: dict[str, float] = {}
    difference: float = 0.0
    problem: str = ""
    budget: float = 0.0
    busy: float = 0.0
    times: int = 1


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str = "omniport-graph-times"
    schema_version: int = 1
    made: tuple[str, ...]
    graphs: dict[str, GraphTimes]


@dataclass(frozen=True)
class TimesFile:
    """Where the times of a bundle's graphs are kept.

    Attributes:
        made: what they depend on.
    """

    path: Path
    made: tuple[str, ...]

    @classmethod
    def of(cls, bundle: Bundle, versions: Mapping[str, str], threads: int, compute: str | None) -> TimesFile | None:
        """The file of a bundle; None where nothing is to be kept (``OMNIPORT_CACHE`` is empty).

        Args:
            versions: of the packages, by backend. compute: as of ``OmniSession.open``.
        """
        folder = cache_folder()
        if folder is None:
            return None
        manifest = bundle.manifest
        files = sorted({file for spec in manifest.graphs.values() for file in (spec.file, *spec.data)})
        content = "\n".join(f"{file} {manifest.files[file].sha256.lower()}" for file in files)
        made = (
            hashlib.sha256(content.encode()).hexdigest(),
            *(f"{name} {version}" for name, version in sorted(versions.items())),
            f"{host.cpu_name()}, {host.physical_cores()} cores, {threads} threads",
            compute or "float32",
        )
        name = hashlib.sha256("\n".join(made).encode()).hexdigest()[:32]
        return cls(folder / TIMES_FOLDER / f"{name}.json", made)

    def read(self) -> dict[str, GraphTimes]:
        """Times by graph; none where there are none that can be trusted. Never raises."""
        try:
            kept = msgspec.json.decode(read_own_file(self.path, _MOST_BYTES), type=_Kept)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return {}
        return kept.graphs if kept == _Kept(made=self.made, graphs=kept.graphs) else {}

    def write(self, graphs: Mapping[str, GraphTimes]) -> None:
        """Keep times, in one step. A folder that cannot be written is no reason to fail."""
        content = msgspec.json.format(msgspec.json.encode(_Kept(made=self.made, graphs=dict(graphs))))
        with suppress(OSError), replacing(self.path) as partial:
            partial.touch()
            partial.chmod(0o600)  # whatever the umask: a file that others may write is not read
            partial.write_bytes(content)

    @contextmanager
    def reserved(self) -> Iterator[str]:
        """Within the block no other process measures these graphs. Gives why not, if that cannot be had."""
        lock, held = self.path.with_suffix(".lock"), None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.touch(0o600)
        except OSError as error:
            yield f"{self.path.parent} cannot be written ({error.strerror or error})"
            return
        try:
            held = path_lock(lock)
            others = held is None and os.name == "posix"  # elsewhere nobody can say
            yield "another process is measuring it" if others else ""
        finally:
            if held is not None:
                os.close(held)


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A line of the process that measures: which graph it begins, or what it found."""

    graph: str
    times: GraphTimes | None = None
