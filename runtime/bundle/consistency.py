"""Check that a decoded bundle.json is consistent: paths, references, geometry. Reads no file.

The decoder checks types and field names; this checks what types cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from ..errors import BundleError
from ..speech.ode import SCHEDULED
from .geometry import number_problems
from .graph_spec import DTYPES, GraphSpec
from .listed_files import SHA256, bad_path
from .manifest import KV_FORMS, DitGeometry, Manifest, SolverSpec
from .parts import PARTS, giving, speech_parts

_SPEECH_FIELDS = ("talker", "talker_sampling", "text_tokens", "codec", "dit", "vocoder", "solver")


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Check everything that needs no file.

    Args:
        path: where the manifest was read, for messages.

    Raises:
        BundleError: lists the first problem.
    """
    for problem in _problems(manifest):
        raise BundleError(f"{path}: {problem}. Export the bundle again")


def _problems(manifest: Manifest) -> Iterator[str]:
    yield from _file_problems(manifest)
    yield from number_problems(manifest)  # first: what follows computes with them
    yield from _speech_problems(manifest)
    yield from _kv_problems(manifest)
    for name, graph in manifest.graphs.items():
        yield from _graph_problems(name, graph)
    yield from _token_problems(manifest)
    yield from _quantization_problems(manifest)


def _file_problems(manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        reason = "is the manifest itself" if name == "bundle.json" else bad_path(name)
        if reason:
            yield f"file {name!r} {reason}; a relative path with '/' that stays inside the bundle was expected"
        if not 0 <= record.size < 1 << 50:
            yield f"file {name!r} has size {record.size}; 0 or more, and below 2**50, was expected"
        if not SHA256.fullmatch(record.sha256):
            yield f"file {name!r} has sha256 {record.sha256[:80]!r}; 64 hexadecimal digits were expected"
    for what, name in _references(manifest):
        if name not in manifest.files:
            yield f"{what} is {name!r}, which 'files' does not list"


def _references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(what refers, file) for every file that the manifest's fields name."""
    yield "tokenizer_file", manifest.tokenizer_file
    if manifest.ranges_file is not None:
        yield "ranges_file", manifest.ranges_file
    for decoder, geometry in manifest.decoders.items():
        yield f"{decoder}.embedding_file", geometry.embedding_file
    for voice in manifest.voices:
        yield f"file of voice {voice.name!r}", voice.file
    for name, graph in manifest.graphs.items():
        yield f"file of graph {name!r}", graph.file
        for data in graph.data:
            yield f"data of graph {name!r}", data


def _speech_problems(manifest: Manifest) -> Iterator[str]:
    missing = [field for field in _SPEECH_FIELDS if getattr(manifest, field) is None]
    if not manifest.voices:
        missing.append("voices")
    if len(missing) not in (0, len(_SPEECH_FIELDS) + 1):
        yield f"the speech part is incomplete: {', '.join(missing)} missing"
    if missing and any(part.name in manifest.graphs for part in speech_parts()):
        yield f"there are speech graphs but no {', '.join(missing)}"
    names = [voice.name for voice in manifest.voices]
    if len(set(names)) != len(names):
        yield f"two voices have the same name: {', '.join(names)}"
    if manifest.talker is not None and manifest.talker.embedding_size != manifest.thinker.hidden_size:
        yield (
            f"talker.embedding_size is {manifest.talker.embedding_size}; the thinker's width "
            f"{manifest.thinker.hidden_size} was expected"
        )
    if manifest.solver is not None:
        yield from _solver_problems(manifest.solver)
    if manifest.dit is not None:
        yield from _dit_problems(manifest, manifest.dit)


def _dit_problems(manifest: Manifest, dit: DitGeometry) -> Iterator[str]:
    if dit.block_size % dit.repeats:
        yield f"dit.block_size {dit.block_size} is not a multiple of dit.repeats {dit.repeats}"
    if dit.past_layers and manifest.schema_version < 3:
        yield f"schema version {manifest.schema_version} has no dit.past_layers"
    if (graph := manifest.graphs.get(giving("velocity").name)) is None:
        return
    for tensors, side in ((graph.inputs, "past_"), (graph.outputs, "present_")):
        found = {tensor.name for tensor in tensors if tensor.name.startswith(side)}
        if found != {side + name for name in dit.past_names}:
            there = ", ".join(sorted(found)) or f"no {side}*"
            yield f"graph {graph.name!r} has {there}; dit.past_layers is {dit.past_layers}"


def _solver_problems(solver: SolverSpec) -> Iterator[str]:
    if solver.method not in SCHEDULED:
        yield f"solver.method is {solver.method!r}; this release knows {', '.join(SCHEDULED)}"
        return
    if len(solver.grid) < 2 or len(solver.stages) != len(solver.grid) - 1:
        yield f"solver has {len(solver.grid)} grid points and {len(solver.stages)} intervals; one fewer was expected"
    if any(b <= a for a, b in pairwise(solver.grid)):
        yield "solver.grid does not increase"
    points = len(SCHEDULED[solver.method].points)
    for stages in solver.stages:
        if len(stages) != points or any(not 0 <= s < len(solver.table) for s in stages):
            yield f"solver.stages holds {stages}; {points} below {len(solver.table)} were expected"


def _graph_problems(name: str, graph: GraphSpec) -> Iterator[str]:
    if name not in PARTS or graph.name != name:
        yield f"graph {name!r} (named {graph.name!r}) is not one of {', '.join(PARTS)}"
    inputs, outputs = {t.name for t in graph.inputs}, {t.name for t in graph.outputs}
    if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
        yield f"graph {name!r} has two inputs or two outputs of one name"
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.dtype not in DTYPES:
            yield f"tensor {tensor.name!r} of graph {name!r} has dtype {tensor.dtype!r}; known: {', '.join(DTYPES)}"
        if any(isinstance(dim, int) and dim < 1 for dim in tensor.shape):
            yield f"tensor {tensor.name!r} of graph {name!r} has shape {tensor.shape}"
    for dim, span in graph.dims.items():
        least = 0 if graph.grows else 1  # a cache that grows begins empty
        if not least <= span.min <= span.opt <= span.max:
            yield f"dimension {dim!r} of graph {name!r} ranges over {span.min}, {span.opt}, {span.max}"
    for what, pairs in (("aliases", graph.aliases), ("grows", graph.grows)):
        for output, source in pairs.items():
            if output not in outputs or source not in inputs:
                yield f"graph {name!r} {what} output {output!r} to input {source!r}, which are not both there"


def _kv_problems(manifest: Manifest) -> Iterator[str]:
    form = manifest.kv.form
    if form not in KV_FORMS:
        yield f"kv.form is {form!r}; this release runs {', '.join(KV_FORMS)}"
    if manifest.kv.dtype not in DTYPES:
        yield f"kv.dtype is {manifest.kv.dtype!r}; known: {', '.join(DTYPES)}"
    if form != "static" and manifest.schema_version < 2:
        yield f"schema version {manifest.schema_version} has no {form} KV cache"
    for name, graph in manifest.graphs.items():
        other, pairs = ("grows", graph.grows) if form == "static" else ("aliases", graph.aliases)
        if pairs:
            yield f"graph {name!r} has {other}, which a {form} KV cache does not go with"


def _quantization_problems(manifest: Manifest) -> Iterator[str]:
    if manifest.quantization is None:
        return
    if manifest.schema_version < 2:
        yield f"schema version {manifest.schema_version} has no quantization"
    for name in (*manifest.quantization.layers, *manifest.quantization.graph_recipes):
        if name not in PARTS:
            yield f"quantization names a graph {name!r}; known: {', '.join(PARTS)}"


def _token_problems(manifest: Manifest) -> Iterator[str]:
    vocabulary = manifest.thinker.vocab_size
    ids = [*msgspec.structs.asdict(manifest.tokens).values(), *manifest.chat.stop]
    if manifest.text_tokens is not None:
        ids += [*msgspec.structs.asdict(manifest.text_tokens).values(), *(voice.bos_token for voice in manifest.voices)]
    if bad := [i for i in ids if not 0 <= i < vocabulary]:
        yield f"token id {bad[0]} is outside the thinker's vocabulary of {vocabulary}"
    if manifest.codec is not None and manifest.talker is not None:
        codec = manifest.codec
        codes = [codec.pad, codec.bos, codec.eos, codec.mask, *codec.stop, *codec.suppress]
        if bad := [i for i in codes if not 0 <= i < manifest.talker.vocab_size]:
            yield f"codec id {bad[0]} is outside the talker's vocabulary of {manifest.talker.vocab_size}"
