"""Scan an ONNX file without the onnx package: operator domains and external data files.

A graph of a bundle may use standard operators only, and its weights must be the files that the manifest lists. This
walks the protobuf wire format (onnx.proto: ModelProto and the messages below it) over a memory map and skips tensor
contents, so that even a file of gigabytes is scanned in a moment. Fields are known by an allow-list: what a later ONNX
adds may point to a file, too, and is refused until somebody has looked.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import BundleError
from .graph_spec import GraphSpec

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTIONS = 7, 8, 25
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL, _ENTRY_KEY, _ENTRY_VALUE = 13, 1, 2
_OPSET_DOMAIN = 1
_MAX_DEPTH = 16

#: message -> its fields that are known to name no file, or are looked into. Not among them: sparse tensors (of a graph,
#: of an attribute), types as attributes, references to a function's attributes, training, devices, quantization notes
_KNOWN: dict[str, frozenset[int]] = {
    "model": frozenset({*range(1, 9), 14, _MODEL_FUNCTIONS}),
    "graph": frozenset({1, 2, 5, 10, 11, 12, 13, 16}),
    "node": frozenset({*range(1, 8), 9}),
    "attribute": frozenset({*range(1, 12), 13, 20}),
    "tensor": frozenset({1, 2, *range(4, 15), 16}),
    "entry": frozenset({_ENTRY_KEY, _ENTRY_VALUE}),
    "opset": frozenset({_OPSET_DOMAIN, 2}),
}


@dataclass
class OnnxSummary:
    """Domains named by operators and opset imports, local functions, and locations of external data."""

    domains: set[str] = field(default_factory=set)
    functions: int = 0
    external: set[str] = field(default_factory=set)


def check_graph_file(path: Path, spec: GraphSpec) -> None:
    """Standard operators only, and no weights but those that the manifest lists for this graph.

    Args:
        path: of ``spec.file`` in its bundle.

    Raises:
        BundleError: something else is in the file, or it is no readable ONNX file.
    """
    summary = scan_onnx(path)
    foreign = sorted(summary.domains - STANDARD_DOMAINS)
    if foreign or summary.functions:
        what = f"operators of {', '.join(foreign)}" if foreign else f"{summary.functions} local functions"
        raise BundleError(f"{path} uses {what}; a bundle's graphs hold standard ONNX operators only. Export it again")
    folder = PurePosixPath(spec.file).parent
    for location in sorted(summary.external):
        name = str(folder / location)
        if name not in spec.data or ".." in PurePosixPath(name).parts:
            raise BundleError(
                f"{path} takes weights from {location!r}, which bundle.json does not list for graph {spec.name!r} "
                f"(it lists {', '.join(spec.data) or 'none'}). Export the bundle again"
            )


def scan_onnx(path: Path) -> OnnxSummary:
    """Scan one ONNX file.

    Raises:
        BundleError: the file is not a readable protobuf message, or has a field that is not known here.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            summary = OnnxSummary()
            _model(data, summary)
            return summary
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a readable ONNX file ({error}): copy or export the bundle again") from error


def _model(data: mmap.mmap, out: OnnxSummary) -> None:
    for number, start, end in _fields(data, 0, len(data), "model"):
        if number == _MODEL_GRAPH:
            _graph(data, start, end, out, 0)
        elif number == _MODEL_OPSET:
            out.domains.add(_text(data, start, end, _OPSET_DOMAIN, "opset"))
        elif number == _MODEL_FUNCTIONS:
            out.functions += 1


def _graph(data: mmap.mmap, start: int, end: int, out: OnnxSummary, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"graphs nested more than {_MAX_DEPTH} deep")
    for number, first, last in _fields(data, start, end, "graph"):
        if number == _GRAPH_NODE:
            _node(data, first, last, out, depth)
        elif number == _GRAPH_INITIALIZER:
            _tensor(data, first, last, out)


def _node(data: mmap.mmap, start: int, end: int, out: OnnxSummary, depth: int) -> None:
    domain = ""
    for number, first, last in _fields(data, start, end, "node"):
        if number == _NODE_DOMAIN:
            domain = data[first:last].decode()
        elif number == _NODE_ATTRIBUTE:
            for kind, a, b in _fields(data, first, last, "attribute"):
                if kind in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                    _tensor(data, a, b, out)
                elif kind in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    _graph(data, a, b, out, depth + 1)
    out.domains.add(domain)


def _tensor(data: mmap.mmap, start: int, end: int, out: OnnxSummary) -> None:
    for number, first, last in _fields(data, start, end, "tensor"):
        if number == _TENSOR_EXTERNAL and _text(data, first, last, _ENTRY_KEY) == "location":
            out.external.add(_text(data, first, last, _ENTRY_VALUE))


def _text(data: mmap.mmap, start: int, end: int, wanted: int, message: str = "entry") -> str:
    """The last value of a string field, as protobuf readers take it; empty if absent."""
    text = ""
    for number, first, last in _fields(data, start, end, message):
        if number == wanted:
            text = data[first:last].decode()
    return text


def _fields(data: mmap.mmap, start: int, end: int, message: str) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of every length-delimited field of one message; other known fields are skipped."""
    at, known = start, _KNOWN[message]
    while at < end:
        key, at = _varint(data, at, end)
        wire = key & 7
        if key >> 3 not in known:
            raise ValueError(f"{message} field {key >> 3} is not known to be safe")
        if wire == 2:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise ValueError(f"a field of {size} bytes at offset {at} passes the end of its message")
            yield key >> 3, at, at + size
            at += size
        elif wire == 0:
            _, at = _varint(data, at, end)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at offset {at}")
    if at != end:
        raise ValueError(f"a message ends at offset {at} instead of {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"a malformed number at offset {at}")
