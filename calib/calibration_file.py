"""The calibration file OUT.calib: observed tensors, and the scales chosen from them.

One safetensors file: arrays, and a JSON header under the metadata key ``omniport-calib``. It is read here and written
by `omniport.calib.calibrator`; `omniport.calib.quantizer` needs nothing else of a calibration run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from omniport.runtime.errors import BundleError, UsageError
from omniport.runtime.system.files import open_regular
from omniport.runtime.system.foreign import foreign
from omniport.runtime.system.path_arguments import paths_checked
from safetensors import safe_open
from safetensors.numpy import save

Array = NDArray[Any]
HEADER_KEY = "omniport-calib"
SCHEMA_VERSION = 2
#: 1 has no outputs of convolutions, and everything else as now
_READABLE = (1, SCHEMA_VERSION)
#: ways to choose a range: largest magnitude, 99.99th percentile, least entropy lost, least squared error
CLIPS = ("max", "percentile", "entropy", "mse")
#: array of a site -> what it holds; those after ``hist`` may be missing
ARRAYS: Mapping[str, str] = {
    "absmax": "[K] float32: largest magnitude of each channel",
    "hist": "[2048] int64: counts of |x| in equal bins from 0 to the largest magnitude",
    "smooth": "[K] float32: SmoothQuant's factors; the input is divided by them, rows of the weight multiplied",
    "awq-32": "[K] float32: AWQ's factors for INT4 in blocks of 32, same meaning",
    "awq-128": "[K] float32: AWQ's factors for INT4 in blocks of 128, same meaning",
}


class SiteRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tensor that products of a graph read, or that a convolution gives.

    Attributes:
        weights: initializers of the graph that multiply it, in the graph's order; the first names the site. Of an
            output, the one weight of the convolution.
        kind: ``matmul`` or ``conv``.
        count: values seen.
        clips: way to choose a range -> the largest magnitude that it keeps.
        output: it is what the convolution gives (bias included), not what it reads.
    """

    weights: tuple[str, ...]
    kind: str
    count: int
    clips: dict[str, float]
    output: bool = False


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The JSON header.

    Attributes:
        fingerprint: of the checkpoint that was calibrated, as in bundle.json.
        data: sha256 of what was read: the messages and their media.
        samples: how many conversations.
        seed: of everything drawn.
        created_by: versions of omniport and of what chose the scales.
        graphs: graph -> its sites.
    """

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    data: str
    samples: int
    seed: int
    created_by: dict[str, str]
    graphs: dict[str, tuple[SiteRecord, ...]]


@dataclass(frozen=True)
class Site:
    """A site and its arrays (`ARRAYS`)."""

    record: SiteRecord
    arrays: Mapping[str, Array]

    @property
    def name(self) -> str:
        return site_name(self.record.weights[0], self.record.output)


@dataclass(frozen=True)
class Calibration:
    """A calibration in memory: arrays are one number per channel, some MB for the largest model."""

    header: Header
    graphs: Mapping[str, tuple[Site, ...]]

    @cached_property
    def _by_weight(self) -> Mapping[tuple[str, str], Site]:
        return {
            (graph, site_name(weight, site.record.output)): site
            for graph, sites in self.graphs.items()
            for site in sites
            for weight in site.record.weights
        }

    def site(self, graph: str, weight: str, output: bool = False) -> Site | None:
        """The site whose tensor that weight of that graph multiplies, or what its convolution gives."""
        return self._by_weight.get((graph, site_name(weight, output)))

    def check(self, fingerprint: str, what: object) -> None:
        """Refuse to be used on another checkpoint.

        Raises:
            UsageError: it was made from another one.
        """
        if self.header.fingerprint != fingerprint:
            raise UsageError(
                f"the calibration is of another checkpoint ({self.header.fingerprint[:12]}) than {what} "
                f"({fingerprint[:12]}). Run omniport calibrate on the checkpoint that it was exported from"
            )

    def encode(self) -> bytes:
        """The file's bytes: the same for the same contents."""
        tensors = {
            f"{graph}/{site.name}/{name}": np.ascontiguousarray(array)
            for graph, sites in self.graphs.items()
            for site in sites
            for name, array in site.arrays.items()
        }
        header = msgspec.json.encode(self.header, order="sorted").decode()
        return bytes(save(tensors, {HEADER_KEY: header}))

    @classmethod
    @paths_checked
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file written by `encode`.

        Raises:
            BundleError: no such file, damaged, or of another schema version.
        """
        path = Path(path)
        with foreign(BundleError, f"cannot read the calibration {path}", "Run omniport calibrate again"):
            open_regular(path).close()  # the library would wait for whoever writes into a pipe
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get(HEADER_KEY)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if text is None:
            raise BundleError(f"{path} is no calibration: a safetensors file without {HEADER_KEY!r} in its metadata")
        header = _header(path, text)
        return cls(header, {graph: _sites(path, graph, records, arrays) for graph, records in header.graphs.items()})


def site_name(weight: str, output: bool = False) -> str:
    """Name of the site that a weight names: of what is multiplied, or of what its convolution gives."""
    return f"{weight}:output" if output else weight


def _header(path: Path, text: str) -> Header:
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"the header of {path} is damaged: {error}. Run omniport calibrate again") from error
    if header.schema_version not in _READABLE:
        raise BundleError(
            f"{path} has schema version {header.schema_version}, expected {SCHEMA_VERSION}. Calibrate again"
        )
    return header


def _sites(path: Path, graph: str, records: tuple[SiteRecord, ...], arrays: Mapping[str, Array]) -> tuple[Site, ...]:
    sites = []
    for record in records:
        prefix = f"{graph}/{site_name(record.weights[0], record.output)}/"
        found = {name: arrays[prefix + name] for name in ARRAYS if prefix + name in arrays}
        if "absmax" not in found or "hist" not in found or set(record.clips) != set(CLIPS):
            raise BundleError(f"{path} lacks ranges of {prefix[:-1]}. Run omniport calibrate again")
        sites.append(Site(record, found))
    return tuple(sites)
