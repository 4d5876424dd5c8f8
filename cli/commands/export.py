"""omniport export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from omniport.export.option_values import OPS, PRECISIONS, TOKEN2WAV_PRECISIONS, ZERO_POINTS

from ..common import JsonFlag, QuietFlag, log_console, print_json, print_table, progress_bar, require_extra, size_text
from ..options import FpsOption, MaxFramesOption, MaxPixelsOption, one_of

NAME = "export"
EXAMPLE = "omniport export Qwen/Qwen2.5-Omni-3B bundle --precision fp16"

#: what export imports; the extra ``export`` brings all of it
EXPORT_MODULES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "ml_dtypes")
#: what comparing graphs with the reference imports: ONNX Runtime besides, which an extra of its own brings
COMPARE_MODULES = (*EXPORT_MODULES, "onnxruntime")


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder, Hugging Face id, or modelscope:ID of a Qwen2.5-Omni checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="Bundle folder to write; a rerun skips graphs that did not change.")],
    precision: Annotated[
        str, one_of(PRECISIONS, help="Weights and matrix products; norms and the ODE state stay in FP32.")
    ] = "fp32",
    token2wav: Annotated[
        str, one_of(TOKEN2WAV_PRECISIONS, help="DiT and vocoder with --precision fp16 or bf16; published in FP32.")
    ] = "fp32",
    graphs: Annotated[
        str, typer.Option(metavar="A,B", help="Export these graphs only, for example thinker,talker.")
    ] = "",
    max_context: Annotated[int, typer.Option(min=64, help="KV cache capacity in tokens.")] = 8192,
    ops: Annotated[
        str,
        one_of(OPS, help="decomposed: opset 18, for TensorRT before 10.15 (JetPack 6); goes with --kv concat."),
    ] = "native",
    kv: Annotated[
        str, one_of(("static", "concat"), help="static: updated in place; concat: each step returns a longer cache.")
    ] = "static",
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Layers that stay FP32, as in thinker/.*down_proj; may be repeated."),
    ] = None,
    ranges: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ranges from omniport ranges: FP16 graphs keep in FP32 what overflows."),
    ] = None,
    zero_points: Annotated[
        str,
        one_of(ZERO_POINTS, help="Zero points of GPTQ/AWQ weights: keep, or separate into a second MatMul (TensorRT)."),
    ] = "keep",
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = None,
    max_frames: MaxFramesOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Export a checkpoint to a bundle.

    The bundle holds one ONNX file per model part, and beside them all that the runtime needs. Weights of GPTQ and AWQ
    checkpoints stay the integers that they are.
    """
    wanted = graph_list(graphs)
    require_extra("export", *EXPORT_MODULES)
    from omniport.export import export_checkpoint

    with progress_bar(quiet or json) as progress:
        report = export_checkpoint(
            checkpoint,
            out,
            precision=precision,
            token2wav=token2wav,
            graphs=wanted,
            max_context=max_context,
            ops=ops,
            kv=kv,
            keep_fp32=tuple(keep_fp32 or ()),
            ranges=ranges,
            zero_points=zero_points,
            max_pixels=max_pixels,
            fps=fps,
            max_frames=max_frames,
            progress=progress,
        )
    if json:
        print_json(report)
        return
    rows = (
        (row.name, "-", size_text(row.weight_bytes), "unchanged")
        if row.skipped
        else (row.name, row.nodes, size_text(row.weight_bytes), f"{row.seconds:.1f}")
        for row in report.graphs
    )
    print_table(f"Exported to {report.path}", ("graph", "nodes", "weights", "seconds"), rows)
    tokens = " ".join(report.added_tokens)
    for note in (*([f"added tokens of the checkpoint: {tokens}"] if tokens else []), *report.notes):
        log_console(quiet).print(note, markup=False)
    for row in report.graphs:
        if row.overflowing:
            log_console(quiet).print(
                f"{row.name}: {len(row.overflowing)} operators stay FP32, their measured range is too large for FP16: "
                f"{', '.join(row.overflowing[:3])}{' ...' if len(row.overflowing) > 3 else ''}",
                markup=False,
            )
        if row.weights:
            counts = ", ".join(f"{count} {name}" for name, count in sorted(row.weights.items()))
            log_console(quiet).print(f"{row.name}: linear layers as the checkpoint packs them: {counts}", markup=False)
    log_console(quiet).print(f"Next: omniport run {report.path} --text 'Hello' --speak reply.wav")


def graph_list(text: str) -> tuple[str, ...] | None:
    """Graph names out of ``a,b``; None (all of them) when empty.

    Raises:
        UsageError: a name that is no graph.
    """
    from omniport.runtime.bundle.parts import PARTS
    from omniport.runtime.errors import UsageError

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise UsageError(f"--graphs: no graph named {', '.join(unknown)}; known: {', '.join(PARTS)}")
    return names or None
