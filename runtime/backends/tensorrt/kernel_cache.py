"""Cache of the kernels that TensorRT-RTX compiles at run time, kept for the next process.

Compiling them takes seconds whenever a session is opened, and they are the same each time. They are code that a GPU
runs, so they lie in the user's own cache folder and never in a bundle, which may come from anywhere. A file is taken
only if it is the user's own and whole, and was made with the same engine by the same builder and version on the same
kind of GPU; TensorRT-RTX then looks at driver and compiler itself. Anything else is left alone, and compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...bundle.engines import Engine
from ...system.files import cache_folder, read_own_file, replacing

#: a file that is larger is not read: the kernels of an engine are a few megabytes
MOST_BYTES = 256 << 20
_MOST_HEADER = 4096


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """First line of a file, as JSON; the kernels follow."""

    format: str = "omniport-kernels"
    schema_version: int = 1
    engine: str
    """sha256 of the engine"""
    builder: str
    version: str
    capability: str
    device: str
    """the driver's name of the GPU"""
    size: int
    sha256: str


@dataclass(frozen=True)
class KernelFile:
    """Where the kernels of one engine on one kind of GPU are kept."""

    path: Path
    engine: str
    builder: str
    version: str
    capability: str
    device: str

    @classmethod
    def of(cls, engine: Engine, version: str, device: str) -> KernelFile | None:
        """The file of an engine; None where nothing is to be kept (``OMNIPORT_CACHE`` is empty).

        Args:
            version: of the builder that runs here.
            device: the driver's name of the GPU.
        """
        folder = cache_folder()
        if folder is None:
            return None
        record = engine.record
        made = (record.engine.sha256.lower(), record.builder, version, record.compute_capability, device)
        name = hashlib.sha256("\n".join(made).encode()).hexdigest()
        return cls(folder / "kernels" / f"{record.graph}-{name[:32]}.kernels", *made)

    def read(self) -> bytes:
        """The kernels; empty if there are none that can be trusted. Never raises."""
        try:
            data = read_own_file(self.path, MOST_BYTES)
        except OSError:
            return b""
        line, _, kernels = data.partition(b"\n")
        if len(line) > _MOST_HEADER:
            return b""
        try:
            header = msgspec.json.decode(line, type=_Header)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return b""
        return kernels if header == self._header(kernels) else b""

    def write(self, kernels: bytes) -> None:
        """Keep the kernels, in one step. A folder that cannot be written is no reason to fail."""
        if not kernels or len(kernels) + _MOST_HEADER > MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.touch()
                partial.chmod(0o600)  # whatever the umask: a file that others may write is not read
                with open(partial, "wb") as file:
                    file.write(msgspec.json.encode(self._header(kernels)) + b"\n")
                    file.write(kernels)

    def _header(self, kernels: bytes) -> _Header:
        return _Header(
            engine=self.engine,
            builder=self.builder,
            version=self.version,
            capability=self.capability,
            device=self.device,
            size=len(kernels),
            sha256=hashlib.sha256(kernels).hexdigest(),
        )
