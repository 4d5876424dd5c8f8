"""Graphs for older parsers: what they are made of, that they compute the same, and the KV cache that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from omniport.cli.main import run
from omniport.export.exporter import export_checkpoint
from omniport.export.models.signals import picture, voice
from omniport.export.validation.checks.graphs import graph_checks
from omniport.export.validation.types import FAIL
from omniport.export.validation.validate import validate
from omniport.runtime import AudioChunk, Done, OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, ExportError, OmniportError
from omniport.runtime.generation.decoder import Decoder
from onnx import TensorProto
from support.comparison import assert_all_pass, context_of

WIDTH = 128  # of the thinker of ``tiny``

#: operators these graphs may use: all are in the support matrix of TensorRT's parser, by 8.6 at the latest
PARSER_KNOWS = """
Add And Cast Clip Concat Constant Conv ConvTranspose Cos Div Equal Erf Expand Gather Greater LayerNormalization Less
LessOrEqual MatMul Max Min Mod Mul Neg Or Pad Pow Range ReduceMean Reshape Round ScatterElements Shape Sigmoid Sin Slice
Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where
"""


# --- what the graphs are made of -----------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", PARTS)
def test_operators_are_old_ones(lowered_bundle: Path, graph: str) -> None:
    path = lowered_bundle / "graphs" / f"{graph}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    (entry,) = model.opset_import
    assert entry.domain == ""
    assert entry.version == Bundle.open(lowered_bundle).manifest.graphs[graph].opset == 18
    assert {node.op_type for node in model.graph.node} <= set(PARSER_KNOWS.split())
    assert all(len(node.input) <= 3 for node in model.graph.node if node.op_type == "Pad"), "axes came with 10.4"
    assert {value.name for value in model.graph.input} <= {name for node in model.graph.node for name in node.input}


@pytest.mark.parametrize("graph", PARTS)
def test_operators_take_the_types_that_tensorrt_documents(lowered_bundle: Path, tiny_bundle: Path, graph: str) -> None:
    """Its matrix of operators has Neg for no INT64 and Equal for no BOOL, whatever the parser lets through."""
    integers, floats = (TensorProto.INT32, TensorProto.INT64), (TensorProto.FLOAT, TensorProto.FLOAT16)
    known = {"Neg": floats, "Abs": floats, "Sign": floats, "Equal": (*integers, *floats), "Mod": integers}
    for bundle in (lowered_bundle, tiny_bundle):
        model = onnx.load(bundle / "graphs" / f"{graph}.onnx", load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {weight.name: weight.data_type for weight in inferred.initializer}
        for node in model.graph.node:
            if node.op_type in known:
                assert types[node.input[0]] in known[node.op_type], f"{node.op_type} {node.name}"


@pytest.mark.parametrize("graph", ["thinker", "talker"])
def test_the_cache_grows(lowered_bundle: Path, graph: str) -> None:
    manifest = Bundle.open(lowered_bundle).manifest
    spec, geometry = manifest.graphs[graph], getattr(manifest, graph)
    assert manifest.kv.form == "concat"
    assert not spec.aliases
    assert len(spec.grows) == 2 * geometry.num_layers
    for output, source in spec.grows.items():
        heads, width = geometry.num_kv_heads, geometry.head_dim
        assert spec.input(source).shape == ("batch", heads, "past", width)
        assert spec.output(output).shape == ("batch", heads, "live", width)
    assert (spec.dims["past"].min, spec.dims["past"].max) == (0, 4095)
    assert spec.dims["live"].max == 4096
    assert "capacity" not in spec.dims


# --- what they compute -----------------------------------------------------------------------------------------------


def test_parity(lowered_bundle: Path, tiny_checkpoint: Path) -> None:
    checks = list(graph_checks(context_of(lowered_bundle, tiny_checkpoint)))
    assert_all_pass(checks)
    assert {check.stage for check in checks} == set(PARTS)


MESSAGES: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture(84, 112)},
            {"type": "audio", "audio": (voice(1.3), 16000)},
            {"type": "text", "text": "What is this?"},
        ],
    }
]


def spoken(bundle: Path) -> tuple[Done, NDArray[np.float32]]:
    """A greedy reply over two turns of one session, so that the second meets a cache that was used."""
    greedy = SamplingConfig(max_new_tokens=30)
    with OmniSession.open(bundle, "ort-cpu") as session:
        for _ in session.reply([{"role": "user", "content": "Hello!"}], speak=False, thinker=greedy):
            pass
        events = list(session.reply(MESSAGES, thinker=SamplingConfig(max_new_tokens=10), talker=greedy))
    done = events[-1]
    assert isinstance(done, Done)
    return done, np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])


def test_the_same_conversation(lowered_bundle: Path, tiny_bundle: Path) -> None:
    (got, wave), (want, reference) = spoken(lowered_bundle), spoken(tiny_bundle)
    assert got.token_ids == want.token_ids
    assert got.codec_ids == want.codec_ids
    assert len(want.token_ids) >= 5
    assert len(set(want.codec_ids)) >= 5
    assert float(np.sqrt(np.mean(reference**2))) > 1e-3
    assert float(np.linalg.norm(wave - reference) / np.linalg.norm(reference)) < 1e-3


def test_validate_takes_it(lowered_bundle: Path, tiny_checkpoint: Path) -> None:
    report, _ = validate(lowered_bundle, tiny_checkpoint, graphs=("thinker",))
    assert report.ok, [(c.stage, c.name, c.message) for c in report.checks if c.status == FAIL]
    assert "thinker" in {check.stage for check in report.checks}


def test_native_operators_with_a_cache_that_grows(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_checkpoint(tiny_checkpoint, out, graphs=("thinker",), max_context=4096, kv="concat")
    model = onnx.load(out / "graphs" / "thinker.onnx", load_external_data=False)
    found = {node.op_type for node in model.graph.node}
    assert "Attention" in found
    assert "TensorScatter" not in found
    got, want = replies(graph_of(out), (9, 1, 3)), replies(graph_of(tiny_bundle), (9, 1, 3))
    assert float(np.std(want)) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


# --- the cache --------------------------------------------------------------------------------------------------------


def graph_of(bundle: Path) -> Graph:
    return open_backend("ort-cpu", Bundle.open(bundle), threads=1).graph("thinker")


def embeddings(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def positions(start: int, count: int) -> NDArray[np.int64]:
    return np.tile(np.arange(start, start + count), (3, 1))


def replies(graph: Graph, pieces: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits after each piece of one sequence."""
    rows, decoder = embeddings(sum(pieces)), Decoder(graph, graph.new_cache(64))
    logits = []
    for count in pieces:
        start = decoder.length
        logits.append(decoder.forward(rows[start : start + count], positions(start, count))[0])
    return np.stack(logits)


def feeds(start: int, count: int, seed: int = 0) -> dict[str, Any]:
    return {
        "inputs_embeds": embeddings(start + count, seed)[None, start:],
        "position_ids": positions(start, count)[:, None],
        "kv_positions": np.arange(start + count),
        "write_index": np.asarray([start]),
    }


@pytest.fixture(scope="module")
def lowered_thinker(lowered_bundle: Path) -> Graph:
    return graph_of(lowered_bundle)


def test_pieces_are_the_whole(lowered_thinker: Graph) -> None:
    whole, pieces = replies(lowered_thinker, (13,)), replies(lowered_thinker, (9, 1, 3))
    assert float(np.std(whole)) > 0.1
    np.testing.assert_allclose(pieces[-1], whole[-1], atol=1e-5 * float(np.abs(whole).max()))


def test_cut_back(lowered_thinker: Graph, lowered_bundle: Path) -> None:
    """What lies beyond write_index does not count: the next call gives what it gave without it."""
    geometry = Bundle.open(lowered_bundle).manifest.thinker
    token = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * 4
    cache = lowered_thinker.new_cache(64)
    assert cache.nbytes == 0
    lowered_thinker.run(feeds(0, 6), cache)
    want = lowered_thinker.run(feeds(6, 2), cache)["logits"]
    lowered_thinker.run(feeds(8, 5, seed=3), cache)
    assert cache.nbytes == 13 * token
    got = lowered_thinker.run(feeds(6, 2), cache)["logits"]
    np.testing.assert_array_equal(got, want)
    assert cache.nbytes == 8 * token
    assert cache.capacity == 64
    again = lowered_thinker.run(feeds(0, 6), cache)["logits"]
    np.testing.assert_array_equal(again, lowered_thinker.run(feeds(0, 6), lowered_thinker.new_cache(64))["logits"])


def test_a_gap_is_refused(lowered_thinker: Graph) -> None:
    cache = lowered_thinker.new_cache(64)
    lowered_thinker.run(feeds(0, 3), cache)
    with pytest.raises(OmniportError, match="write_index is 5, and the KV cache of 'thinker' holds 3 tokens"):
        lowered_thinker.run(feeds(5, 1), cache)


def test_a_failed_call_leaves_the_cache(lowered_thinker: Graph) -> None:
    cache = lowered_thinker.new_cache(64)
    lowered_thinker.run(feeds(0, 4), cache)
    wrong = feeds(4, 2) | {"kv_positions": np.arange(9)}  # a mask for more tokens than there are
    with pytest.raises(BackendError, match="could not run graph 'thinker'"):
        lowered_thinker.run(wrong, cache)
    got = lowered_thinker.run(feeds(4, 2), cache)["logits"]
    fresh = lowered_thinker.new_cache(64)
    lowered_thinker.run(feeds(0, 4), fresh)
    np.testing.assert_array_equal(got, lowered_thinker.run(feeds(4, 2), fresh)["logits"])


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ops": "decomposed"}, "--ops decomposed goes with --kv concat"),
        ({"ops": "fused"}, "no --ops 'fused'; known: native, decomposed"),
        ({"kv": "paged"}, "no --kv 'paged'; known: static, concat"),
    ],
)
def test_refused_options(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        export_checkpoint(tiny_checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_too(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["export", str(tiny_checkpoint), str(tmp_path / "out"), "--ops", "decomposed"])
    assert caught.value.code == 2
    assert "--kv concat" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
