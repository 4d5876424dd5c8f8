"""Build every graph of a checkpoint in several precisions for several GPUs, and write down what came of it.

    python -m benchmarks.build_matrix CHECKPOINT [--work FOLDER] [--precisions fp16,bf16,fp32] [--recipes w8,int4]
        [--calib FILE] [--bundles NAME=FOLDER] [--most N] [--out docs/results]

Needs no GPU: nothing is run. Each engine is built in a process of its own and thrown away. Exported and quantized
bundles are made in ``--work`` (a temporary folder by default) and reused if they are there; ``--bundles`` names others.
Recipes quantize the FP16 bundle, with the calibration if one is given; graphs that a recipe leaves alone are built
once. Rows are kept in ``--work`` too: with ``--most`` the script ends after so many builds, and the next call goes on
from there. Writes build-matrix.json and build-matrix.md when every row is there.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.engine_build import measure
from benchmarks.harness import RESULTS, command_line, table

if TYPE_CHECKING:
    from omniport.runtime.bundle.graph_spec import GraphSpec
    from onnx import ModelProto

PRECISIONS = ("fp16", "bf16", "fp32")
#: one card per compute capability
TARGETS = ("rtx-3090", "rtx-4090", "rtx-5090")
#: layer types that have to be the builder's own, by the name they are shown under
NATIVE = {"KV_CACHE_UPDATE": "cache", "ATTENTION_INPUT": "attention", "ROTARY_EMBEDDING": "rotary"}
_COLUMNS = ("weights MB", "engine MB", "over weights MB", "seconds", "peak / weights", "anonymous")
Row = dict[str, Any]


class Matrix:
    """The rows of a table, kept in a folder while they are made.

    Args:
        most: builds at most.
    """

    def __init__(self, work: Path, most: int) -> None:
        from omniport.export.tensorrt.build import builder_version

        self._path, self._left = work / "rows.json", most
        self._version = builder_version("tensorrt-rtx")
        self._rows: dict[str, Row] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def rows(self, bundles: dict[str, Path]) -> list[Row] | None:
        """One row for each engine, under the first bundle that has it; None if some were left for the next call."""
        engines: dict[str, tuple[Path, str, str]] = {}
        for bundle, target, graph in _engines(bundles):
            engines.setdefault(self._key(bundle, target, graph), (bundle, target, graph))
        found = [self._row(key, *engine) for key, engine in engines.items()]
        return None if None in found else [row for row in found if row is not None]

    def _row(self, key: str, bundle: Path, target: str, graph: str) -> Row | None:
        if key not in self._rows and self._left:
            self._left -= 1
            print(f"{bundle.name} {target} {graph}", file=sys.stderr, flush=True)
            self._rows[key] = measure(bundle, graph, target)
            scratch = self._path.with_suffix(".new")
            scratch.write_text(json.dumps(self._rows))
            scratch.replace(self._path)
        return self._rows.get(key)

    def _key(self, bundle: Path, target: str, graph: str) -> str:
        """The builder, the code that drives it, and what the engine is made from."""
        from omniport.export.devices.detect import find_target
        from omniport.export.tensorrt.build import engine_key
        from omniport.export.tensorrt.profiles import Limits
        from omniport.runtime.bundle.reader import Bundle

        opened = Bundle.open(bundle)
        spec = opened.manifest.graphs[graph]
        return engine_key(opened, spec, find_target(target), "tensorrt-rtx", self._version, Limits())


def _engines(bundles: dict[str, Path]) -> Iterator[tuple[Path, str, str]]:
    for bundle in bundles.values():
        for target in TARGETS:
            for graph in json.loads((bundle / "bundle.json").read_text())["graphs"]:
                yield bundle, target, graph


def make_bundles(
    checkpoint: Path, work: Path, precisions: Sequence[str], recipes: Sequence[str], calibration: Path | None = None
) -> dict[str, Path]:
    """Export and quantize what is not there yet; the bundle of each precision and recipe."""
    for precision in dict.fromkeys([*precisions, *(["fp16"] if recipes else [])]):
        half = ["--token2wav", "fp16"] if precision == "fp16" else []
        _omniport(work / precision, "export", str(checkpoint), str(work / precision), "--precision", precision, *half)
    calib = [] if calibration is None else ["--calib", str(calibration)]
    for recipe in recipes:
        _omniport(work / recipe, "quantize", str(work / "fp16"), str(work / recipe), "--recipe", recipe, *calib)
    return {name: work / name for name in (*precisions, *recipes)}


def _omniport(made: Path, *arguments: str) -> None:
    if not (made / "bundle.json").exists():
        command = [sys.executable, "-c", "from omniport.cli.main import run; run()"]
        subprocess.run([*command, *arguments], check=True)


def fp8_model() -> tuple[ModelProto, GraphSpec]:
    """A matrix product with quantized values on both sides."""
    from omniport.runtime.bundle.graph_spec import DimRange, GraphSpec, TensorSpec
    from onnx import TensorProto, helper, numpy_helper

    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    packed = helper.make_tensor("packed", TensorProto.FLOAT8E4M3FN, [64, 64], bytes(range(64)) * 64, raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="layers.0/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["xq"], name="layers.0/DequantizeLinear"),
        helper.make_node("DequantizeLinear", ["packed", "scale"], ["wq"], name="layers.0/DequantizeLinear_1"),
        helper.make_node("MatMul", ["xq", "wq"], ["y"], name="layers.0/MatMul"),
    ]
    x, y = (TensorSpec(name, "float32", ("batch", 64)) for name in ("x", "y"))
    start, end = ([helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape)] for t in (x, y))
    graph = helper.make_graph(nodes, "g", start, end, [scale, zero, packed])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    dims = {"batch": DimRange(1, 1, 4)}
    spec = GraphSpec(
        name="dit",
        file="graphs/dit.onnx",
        data=(),
        precision="float32",
        opset=24,
        inputs=(x,),
        outputs=(y,),
        dims=dims,
        aliases={},
    )
    return model, spec


def fp8_rows() -> list[Row]:
    """FP8 where it is and where it is not, on one quantized matrix product."""
    import onnx
    from omniport.export.devices.detect import find_target
    from omniport.export.tensorrt.builder_api import load_api
    from omniport.export.tensorrt.engine_builder import build_engine
    from omniport.runtime.errors import BuildError

    model, spec = fp8_model()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp8.onnx"
        onnx.save(model, path)
        for target in TARGETS:
            row: Row = {"target": target, "built": True, "message": None}
            try:
                build_engine(load_api("tensorrt-rtx"), path, spec, find_target(target), Path(folder) / "fp8.engine")
            except BuildError as error:
                row |= {"built": False, "message": str(error)}
            rows.append(row)
    return rows


def page(document: dict[str, Any]) -> str:
    """docs/results/build-matrix.md."""
    rows: list[Row] = [row for row in document["engines"] if "failed" not in row]
    over = [row["engine_bytes"] - row["weights_bytes"] for row in rows]
    ratios = [row["engine_bytes"] / row["weights_bytes"] for row in rows]
    lines = [
        "# Engines of real-width graphs",
        "",
        "Made by `make build-matrix`: do not edit by hand. The graphs of `make-checkpoint",
        "--size small` (the 3B's layer widths, four layers a stack), built without a GPU: *built, not run*.",
        "",
        f"{document['builder']}, on {document['machine']}.",
        "",
        f"{len(rows)} engines. The one furthest from its weights is {max(ratios):.3f} times them, and none is more",
        f"than its weights and {max(over) / 1e6:.1f} MB.",
        "Peak memory is resident memory of the building process above what it held before parsing, over the weights;",
        "*anonymous* is the part that the kernel cannot drop and read again. Layers are those of the parsed network.",
        "Recipes of `omniport quantize` are of the FP16 bundle; graphs that one leaves alone are not listed again.",
        "",
        *table(("precision", "GPU", "graph", *_COLUMNS, *NATIVE.values()), map(_cells, rows)),
    ]
    lines += _halves(rows)
    refused = [row for row in document["engines"] if "failed" in row]
    if refused:
        cells = ((row["precision"], row["sm"], row["graph"], row["failed"]) for row in refused)
        lines += ["", "Not built:", "", *table(("precision", "GPU", "graph", "message"), cells)]
    fp8 = ((row["sm"], "yes" if row["built"] else "no", row["message"] or "") for row in document["fp8"])
    lines += ["", "FP8, one matrix product with Q/DQ on both sides:", "", *table(("GPU", "built", "message"), fp8)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[object, ...]:
    weights, engine = row["weights_bytes"], row["engine_bytes"]
    return (
        row["precision"],
        row["sm"],
        row["graph"],
        *(f"{size / 1e6:.1f}" for size in (weights, engine, engine - weights)),
        row["seconds"],
        f"{row['peak_bytes'] / weights:.2f}",
        f"{row['anonymous_bytes'] / weights:.2f}",
        *(row["layers"].get(kind, 0) for kind in NATIVE),
    )


def _halves(rows: Sequence[Row]) -> list[str]:
    """Engines of the recipes beside those in FP16."""
    half = {(row["target"], row["graph"]): row["engine_bytes"] for row in rows if row["precision"] == "fp16"}
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["precision"] not in PRECISIONS and (row["target"], row["graph"]) in half:
            found, name = ratios.setdefault(row["precision"], {}), row["graph"]
            found[name] = max(found.get(name, 0.0), row["engine_bytes"] / half[row["target"], name])
    names = list(dict.fromkeys(name for found in ratios.values() for name in found))
    cells = ((recipe, *(f"{r[name]:.3f}" if name in r else "-" for name in names)) for recipe, r in ratios.items())
    title = "Size beside the engine in FP16, largest over the GPUs:"
    return ["", title, "", *table(("recipe", *names), cells)] if ratios else []


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, help="folder for exported bundles and rows; kept")
    parser.add_argument("--precisions", type=_names, default=PRECISIONS, help="comma-separated")
    parser.add_argument("--recipes", type=_names, default=(), help="comma-separated recipes of omniport quantize")
    parser.add_argument("--calib", type=Path, help="calibration of the checkpoint, which some recipes need")
    parser.add_argument("--bundles", type=_names, default=(), help="comma-separated NAME=FOLDER of other bundles")
    parser.add_argument("--most", type=int, default=10**6, help="builds of this call at most; goes with --work")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        bundles = make_bundles(options.checkpoint, work, options.precisions, options.recipes, options.calib)
        bundles |= {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in options.bundles)}
        rows = Matrix(work, options.most).rows(bundles)
    if rows is None:
        print("some builds are left: call again with the same --work", file=sys.stderr)
        return
    _write(options.out, rows)


def _write(out: Path, rows: list[Row]) -> None:
    from omniport.export.devices.detect import find_target
    from omniport.export.tensorrt.build import builder_version
    from omniport.runtime.system.host import cpu_name, usable_cpus

    document = {
        "builder": f"tensorrt-rtx {builder_version('tensorrt-rtx')}",
        "machine": f"{platform.system()} {platform.machine()}, {len(usable_cpus())} cores ({cpu_name()})",
        "engines": [{**row, "sm": find_target(row["target"]).sm} for row in rows],
        "fp8": [{**row, "sm": find_target(row["target"]).sm} for row in fp8_rows()],
    }
    (out / "build-matrix.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "build-matrix.md").write_text(page(document), encoding="utf-8")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    main()
