"""omniport inspect"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common import JsonFlag, QuietFlag, log_console, print_json, print_table, progress_bar, size_text
from ..options import BundleArgument

if TYPE_CHECKING:
    from omniport.runtime.bundle.engines import Engine, Engines
    from omniport.runtime.bundle.graph_spec import TensorSpec
    from omniport.runtime.bundle.manifest import DecoderGeometry, Manifest, Quantization
    from omniport.runtime.bundle.reader import Bundle

NAME = "inspect"
EXAMPLE = "omniport inspect bundle --verify"


def command(
    bundle: BundleArgument,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Hash every file and engine, compare with what is listed, and check that each can be used."
        ),
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show what a bundle holds.

    Geometry, graphs with their inputs and outputs, voices, engines, sizes and the memory of the KV cache.
    """
    from omniport.runtime.bundle.engines import list_engines, verify_engine
    from omniport.runtime.bundle.reader import Bundle
    from omniport.runtime.bundle_check import check_usable
    from omniport.runtime.errors import BundleError

    with progress_bar(quiet or json or not verify) as progress:
        # the library counts bytes over all files: one bar, whatever file it is at
        opened = Bundle.open(bundle, verify=verify, progress=lambda _, done, total: progress("verify", done, total))
        built = list_engines(opened)
        for number, engine in enumerate(built.usable if verify else ()):
            progress("verify engines", number, len(built.usable))
            verify_engine(engine)
        if verify and built.unusable:
            name, reason = next(iter(built.unusable.items()))
            raise BundleError(
                f"{len(built.unusable)} of {len(built.usable) + len(built.unusable)} listed engines cannot be used: "
                f"{name}: {reason}"
            )
        if verify:
            check_usable(opened)
    manifest = opened.manifest
    facts = {**summary(manifest, verified=verify), **engine_facts(built), "not_here": not_here(built)}
    facts["auto_on_cpu"] = auto_on_cpu(opened)
    if json:
        print_json(facts)
        return
    print_table("Bundle", ("what", "value"), _overview(manifest, facts))
    rows = (
        (name, spec.precision, spec.opset, size_text(graph_bytes(manifest, name)), *_tensors(spec.inputs, spec.outputs))
        for name, spec in manifest.graphs.items()
    )
    print_table("Graphs", ("graph", "precision", "opset", "size", "inputs", "outputs"), rows)
    print_auto_on_cpu(facts["auto_on_cpu"])
    if built.usable:
        columns = ("engine", "size", "GPU", "builder", "KV capacity", "built from", "runs here")
        rows = ((*_engine_row(engine), "no" if engine.name in facts["not_here"] else "yes") for engine in built.usable)
        print_table("Engines", columns, rows)
    for reason, count in Counter(facts["not_here"].values()).items():
        log_console(quiet).print(f"not run here ({count}): {reason}", markup=False)
    for reason in built.unusable.values():
        log_console(quiet).print(f"not usable: {reason}", markup=False)
    if verify:
        log_console(quiet).print(f"{len(manifest.files) + len(built.usable)} files match their sha256")


def summary(manifest: Manifest, verified: bool) -> dict[str, Any]:
    """What ``--json`` prints: sizes and KV memory worked out, and the whole manifest as ``manifest``."""
    return {
        "source": manifest.source.name,
        "precision": manifest.precision,
        "verified": verified,
        "bytes": sum(record.size for record in manifest.files.values()),
        "graph_bytes": {name: graph_bytes(manifest, name) for name in manifest.graphs},
        "kv_bytes_per_1k_tokens": {
            name: kv_bytes_per_1k(geometry, manifest.kv.dtype) for name, geometry in manifest.decoders.items()
        },
        "voices": [voice.name for voice in manifest.voices],
        "manifest": manifest,
    }


def engine_facts(built: Engines) -> dict[str, Any]:
    """What ``--json`` prints about engines: each usable one's record by its path, and why others are not usable."""
    return {
        "engines": {engine.name: engine.record for engine in built.usable},
        "unusable_engines": built.unusable,
    }


def not_here(built: Engines) -> dict[str, str]:
    """Why usable engines do not run on this machine, by their path."""
    if not built.usable:
        return {}
    from omniport.runtime.backends.select import this_machine, why_not

    host = this_machine()
    reasons = {engine.name: why_not(engine.record, host, engine.bundle) for engine in built.usable}
    return {name: reason for name, reason in reasons.items() if reason}


def auto_on_cpu(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Where ``auto`` runs each graph on this machine's CPU, by what was measured, and why."""
    from omniport.runtime.backends.mixed.choice import choices

    return {name: {"backend": choice.backend, "why": choice.why} for name, choice in choices(bundle).items()}


def print_auto_on_cpu(chosen: Mapping[str, Mapping[str, str]]) -> None:
    """A table of `auto_on_cpu`, where there is a choice."""
    from omniport.runtime.backends.mixed.choice import openvino_version

    if not openvino_version():
        return
    rows = ((name, choice["backend"], choice["why"]) for name, choice in chosen.items())
    print_table("On this CPU", ("graph", "auto runs it in", "why"), rows)


def _engine_row(engine: Engine) -> tuple[str, ...]:
    record = engine.record
    capacity = record.fixed_dims.get("capacity")
    return (
        engine.name,
        size_text(record.engine.size),
        f"{record.target}, {record.compute_capability}",
        f"{record.builder} {record.builder_version}",
        "-" if capacity is None else str(capacity),
        f"{record.dtype}, {size_text(record.weights_bytes)}",
    )


def graph_bytes(manifest: Manifest, name: str) -> int:
    """Bytes of one graph's ONNX file and external weights."""
    spec = manifest.graphs[name]
    return sum(manifest.files[path].size for path in (spec.file, *spec.data) if path in manifest.files)


def kv_bytes_per_1k(geometry: DecoderGeometry, dtype: str) -> int:
    """KV cache bytes of 1,000 tokens in one decoder: keys and values of every layer."""
    from omniport.runtime.bundle.graph_spec import DTYPES

    return 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * DTYPES[dtype] * 1000


def _overview(manifest: Manifest, facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("source", manifest.source.name),
        ("made by", manifest.created_by),
        ("precision", manifest.precision),
        ("size", size_text(facts["bytes"])),
        ("context", f"{manifest.kv.max_context} tokens, {manifest.kv.form} KV cache in {manifest.kv.dtype}"),
    ]
    if manifest.quantization is not None:
        rows.append(("quantized", _quantization(manifest.quantization)))
    for name, geometry in manifest.decoders.items():
        heads = f"{geometry.num_heads}/{geometry.num_kv_heads} heads of {geometry.head_dim}"
        shape = f"{geometry.num_layers} layers, {geometry.hidden_size} wide, {heads}, vocabulary {geometry.vocab_size}"
        rows.append((name, f"{shape}; KV {size_text(facts['kv_bytes_per_1k_tokens'][name])} per 1,000 tokens"))
    if manifest.solver is not None and manifest.vocoder is not None:
        rows.append(("solver", f"{manifest.solver.method}, {len(manifest.solver.grid)} time points"))
        rows.append(("speech", f"{manifest.vocoder.sample_rate} Hz"))
    rows.append(("voices", ", ".join(facts["voices"]) or "none: this bundle writes text and does not speak"))
    return rows


def _quantization(record: Quantization) -> str:
    """Recipe, or the method of the checkpoint, and how the weights of each graph are stored."""
    parts = []
    for graph, layers in record.layers.items():
        counts = Counter(layers.values())
        parts.append(f"{graph} " + ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items())))
    return f"{record.recipe}, from {record.precision}: {'; '.join(parts)}"


def _tensors(*sides: tuple[TensorSpec, ...]) -> list[str]:
    """One cell per side, a line per tensor; the per-layer cache tensors share a line."""
    cells = []
    for specs in sides:
        lines: dict[str, int] = {}
        for spec in specs:
            name = spec.name.rstrip("0123456789")
            name = f"{name}*" if name.startswith(("past_", "present_")) else spec.name
            shape = ",".join(str(dim) for dim in spec.shape)
            line = f"{name} {spec.dtype} [{shape}]"
            lines[line] = lines.get(line, 0) + 1
        cells.append("\n".join(line if count == 1 else f"{line} x{count}" for line, count in lines.items()))
    return cells
