"""Quantized graphs for older parsers: the numbers of the native ones, in opsets that TensorRT 10.3 takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from omniport.calib.calibration_file import Calibration
from omniport.calib.quantizer import quantize
from omniport.export.devices.catalog import TARGETS
from omniport.export.exporter import export_checkpoint
from omniport.export.tensorrt.build_check import check_bundle
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.generation.decoder import Decoder
from onnx import defs, numpy_helper
from support.calibrations import calibrate_bundle

Array = NDArray[Any]
LOWERED = {"ops": "decomposed", "kv": "concat"}
#: recipe and precision -> the thinker's opset: 21 has blocks, 19 scales in half precision
OPSETS = {("int8", "fp16"): 19, ("edge-8gb", "fp16"): 21, ("int8", "fp32"): 21}


@pytest.fixture(scope="module")
def exported(
    tiny_bundle: Path,
    lowered_bundle: Path,
    tiny_half_bundles: Mapping[str, Path],
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:
    """Precision -> ``tiny``, native and lowered."""
    half = tmp_path_factory.mktemp("lowered") / "fp16"
    export_checkpoint(tiny_checkpoint, half, precision="fp16", token2wav="fp16", max_context=4096, **LOWERED)
    return {"fp32": (tiny_bundle, lowered_bundle), "fp16": (tiny_half_bundles["fp16"], half)}


@pytest.fixture(scope="module")
def calibration(tiny_bundle: Path) -> Calibration:
    return calibrate_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def quantized(
    exported: Mapping[str, tuple[Path, Path]], calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Bundle, Bundle]]:
    """(recipe, precision) -> native and lowered."""
    room, made = tmp_path_factory.mktemp("quantized"), {}
    for recipe, precision in OPSETS:
        pair = []
        for ops, source in zip(("native", "lowered"), exported[precision], strict=True):
            quantize(source, out := room / f"{recipe}-{precision}-{ops}", recipe, calibration=calibration)
            pair.append(Bundle.open(out))
        made[recipe, precision] = (pair[0], pair[1])
    return made


def model_of(bundle: Bundle, graph: str) -> onnx.ModelProto:
    return onnx.load(bundle.path(bundle.manifest.graphs[graph].file))


def numbers(bundle: Bundle, graph: str) -> dict[str, Array]:
    """Integers and scales of a graph's weights, by name."""
    kept = (t for t in model_of(bundle, graph).graph.initializer if t.name.endswith((".integers", ".scales")))
    return {t.name: numpy_helper.to_array(t) for t in kept}


def logits(bundle: Bundle, name: str) -> Array:
    """[8, vocabulary]: a prompt of 20 random tokens, and 7 steps after it."""
    table = bundle.embedding(name)
    rows = table.rows(np.random.default_rng(0).integers(0, table.vocab_size, 27))
    backend = OrtBackend(bundle, threads=1)
    graph = backend.graph(name)
    decoder, found = Decoder(graph, graph.new_cache(32)), []
    for start, stop in [(0, 20), *((n, n + 1) for n in range(20, 27))]:
        positions = np.repeat(np.arange(start, stop)[None], 3, axis=0)
        found.append(decoder.forward(rows[start:stop], positions)[0])
    backend.close()
    return np.stack(found)


def test_operators_mean_the_same_up_to_opset_21(exported: Mapping[str, tuple[Path, Path]]) -> None:
    """What changed of them is more types, and for Cast an attribute that is about 8-bit floats."""
    seen = set()
    for _, root in exported.values():
        for name in PARTS:
            seen |= {node.op_type for node in model_of(Bundle.open(root), name).graph.node}
    changed = {op for op in seen if defs.get_schema(op, 18).since_version != defs.get_schema(op, 21).since_version}
    assert changed == {"Cast", "Constant", "Pad", "Reshape", "Shape", "Squeeze", "Transpose", "Unsqueeze"}
    for op in changed:
        old, new = defs.get_schema(op, 18), defs.get_schema(op, 21)
        assert new.attributes.keys() - old.attributes.keys() <= {"saturate"}
        assert [value.name for value in new.inputs] == [value.name for value in old.inputs]
        wider = {kind.type_param_str: set(kind.allowed_type_strs) for kind in new.type_constraints}
        assert all(set(kind.allowed_type_strs) <= wider[kind.type_param_str] for kind in old.type_constraints)


@pytest.mark.parametrize(("recipe", "precision"), OPSETS)
def test_the_same_numbers_in_an_opset_that_is_old_enough(
    recipe: str, precision: str, quantized: Mapping[tuple[str, str], tuple[Bundle, Bundle]]
) -> None:
    native, lowered = quantized[recipe, precision]
    assert lowered.manifest.graphs["thinker"].opset == OPSETS[recipe, precision]
    for name, spec in lowered.manifest.graphs.items():
        model = model_of(lowered, name)
        assert model.opset_import[0].version == spec.opset in (18, 19, 21)
        assert native.manifest.graphs[name].opset == model_of(native, name).opset_import[0].version == 24
        wanted, got = numbers(native, name), numbers(lowered, name)
        assert wanted.keys() == got.keys()
        assert wanted or name == "bigvgan"
        for weight, values in wanted.items():
            np.testing.assert_array_equal(got[weight], values, err_msg=weight)
        steps = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        blocked = any(attribute.name == "block_size" for node in steps for attribute in node.attribute)
        assert spec.opset == (18 if not steps else 21 if blocked else 19)


@pytest.mark.parametrize(("recipe", "precision"), OPSETS)
def test_logits_alike(
    recipe: str,
    precision: str,
    quantized: Mapping[tuple[str, str], tuple[Bundle, Bundle]],
    exported: Mapping[str, tuple[Path, Path]],
) -> None:
    """Both lose as much. They are not equal: a last bit may round an input to the next integer."""
    for name in ("thinker", "talker"):
        plain = logits(Bundle.open(exported[precision][0]), name)
        native, lowered = (logits(bundle, name) for bundle in quantized[recipe, precision])
        lost, also_lost, apart = (
            float(np.linalg.norm(one - other) / np.linalg.norm(plain))
            for one, other in ((plain, native), (plain, lowered), (native, lowered))
        )
        assert float(np.std(plain)) > 0.01
        assert also_lost < 1.15 * lost
        assert apart < lost


@pytest.mark.parametrize(("recipe", "graphs"), [("int8", tuple(PARTS)), ("edge-8gb", ("talker", "dit"))])
def test_a_board_with_tensorrt_10_3_takes_them(
    recipe: str, graphs: tuple[str, ...], quantized: Mapping[tuple[str, str], tuple[Bundle, Bundle]]
) -> None:
    """TensorRT-RTX stands in for the board's builder, whose parser is only known by its sources.

    `edge-8gb` has two forms of its own: blocks of INT4 in the talker, and INT8 weights alone in the DiT.
    """
    native, lowered = quantized[recipe, "fp16"]
    report = check_bundle(lowered, TARGETS["jetson-orin-nano-8gb"], graphs=graphs)
    assert [graph.graph for graph in report.graphs] == list(graphs)
    for graph in report.graphs:
        assert (graph.problem, graph.note) == ("", ""), graph
        assert graph.compiled_for == "8.6"
    (newer,) = check_bundle(native, TARGETS["jetson-orin-nano-8gb"], graphs=["dit"]).graphs
    assert newer.note.startswith("needs JetPack 7.2 (TensorRT 10.16): TensorRT 10.3 of JetPack 6.2 does not parse")


def test_int8_in_blocks_is_not_for_tensorrt_10_3(quantized: Mapping[tuple[str, str], tuple[Bundle, Bundle]]) -> None:
    _, lowered = quantized["int8", "fp32"]
    (graph,) = check_bundle(lowered, TARGETS["jetson-orin-nano-8gb"], graphs=["talker"]).graphs
    assert "TensorRT 10.3 of JetPack 6.2 does not parse INT8 in blocks (10.16)" in graph.note
