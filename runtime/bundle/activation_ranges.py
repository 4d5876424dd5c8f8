"""Measured activation ranges (ranges.json), and which float16 values of a bundle would overflow by them.

``ranges.json`` is written by `omniport.export.evaluation.measure_ranges`; docs/bundle.md describes it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import BundleError
from ..system.files import read_file
from .manifest import Manifest
from .reader import Bundle

RANGES_FILE = "ranges.json"
#: largest finite float16
FLOAT16_MAX = 65504.0
#: how far an observed range must stay below it: other input than the samples may reach further
MARGIN = 2.0


class LayerRange(msgspec.Struct, frozen=True):
    """The largest magnitude observed of one value.

    Attributes:
        name: ``module.path/Operator:output`` of the node that makes it, or the name of a graph input.
        max: largest ``|x|`` over all samples.
    """

    name: str
    max: float


class Ranges(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """ranges.json."""

    format: str = "omniport-ranges"
    schema_version: int = 1
    fingerprint: str
    """of the checkpoint that was measured"""
    ops: str
    """operators of the measured graphs: native or decomposed"""
    kv: str
    """form of their KV cache"""
    samples: tuple[str, ...]
    """names of the conversations"""
    graphs: dict[str, dict[str, float]]
    """graph -> value -> largest magnitude"""


def limit() -> float:
    """The largest observed magnitude that may be held in float16."""
    return FLOAT16_MAX / MARGIN


def read_ranges(path: Path, manifest: Manifest | None = None) -> Ranges:
    """Read a ranges.json.

    Args:
        manifest: of the bundle whose ranges they have to be; not compared if None.

    Raises:
        BundleError: unreadable, of another format, or measured on another checkpoint.
    """
    try:
        ranges = msgspec.json.decode(read_file(path, 64 << 20), type=Ranges)
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror or error}. Make it with 'omniport ranges' from an FP32 bundle"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not a ranges file: {error}. Make it with 'omniport ranges'") from error
    if ranges.format != "omniport-ranges" or ranges.schema_version != 1:
        raise BundleError(
            f"{path} has format {ranges.format!r}, version {ranges.schema_version}; 'omniport-ranges', version 1, was "
            "expected. Measure again with 'omniport ranges'"
        )
    if manifest is not None and ranges.fingerprint != manifest.source.fingerprint:
        raise BundleError(
            f"{path} was measured on a checkpoint with fingerprint {ranges.fingerprint[:12]}; "
            f"{manifest.source.name} has {manifest.source.fingerprint[:12]}. Measure again with 'omniport ranges'"
        )
    return ranges


def encode_ranges(ranges: Ranges) -> bytes:
    """The bytes of a ranges.json: the same ranges give the same bytes."""
    return msgspec.json.format(msgspec.json.encode(ranges, order="sorted"), indent=1) + b"\n"


def overflowing(bundle: Bundle, graph: str) -> list[LayerRange]:
    """Values that a float16 graph holds in float16 although they were observed too large for it, largest first.

    Empty for graphs in float32 or bfloat16, for a bundle without ranges (``manifest.ranges_file`` is None), and for a
    graph that was exported with ``--ranges``: what overflows is then in float32.

    Raises:
        BundleError: the bundle's ranges cannot be read or are another checkpoint's.
    """
    spec, file = bundle.manifest.graphs[graph], bundle.manifest.ranges_file
    if spec.precision != "float16" or file is None:
        return []
    observed = read_ranges(bundle.path(file), bundle.manifest).graphs.get(graph, {})
    wide = set(spec.float32_values)
    found = [LayerRange(name, top) for name, top in observed.items() if top > limit() and name not in wide]
    return sorted(found, key=lambda layer: (-layer.max, layer.name))
