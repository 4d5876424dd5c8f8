"""Exported graphs: what they hold, weight by weight, and what a second export takes over."""

from __future__ import annotations

import ast
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.exporter import ExportReport, export_checkpoint
from omniport.export.graphs import fingerprint as reuse
from omniport.export.models.model_parts import graph_definitions
from omniport.export.models.ops import CURVE_FACTOR
from omniport.export.validation.validate import validate
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, ExportError
from omniport.runtime.session import OmniSession
from omniport.runtime.speech.ode import rk4_schedule
from safetensors import safe_open
from support.command_line import Omniport

Array = NDArray[Any]

#: where each graph's weights are stored in a checkpoint
PREFIX = {
    "audio_encoder": "thinker.audio_tower.",
    "vision_encoder": "thinker.visual.",
    "thinker": "thinker.",
    "talker": "talker.",
    "dit": "token2wav.code2wav_dit_model.",
    "bigvgan": "token2wav.code2wav_bigvgan_model.",
}
DIT = PREFIX["dit"]
CONTEXT = 4096


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    return weights


def weights_of(checkpoint: Path, graph: str) -> dict[str, torch.Tensor]:
    """The stored tensors that belong to one graph, without their prefix."""
    prefix = PREFIX[graph]
    others = ("audio_tower.", "visual.")
    found = {
        key.removeprefix(prefix): value for key, value in stored_weights(checkpoint).items() if key.startswith(prefix)
    }
    return {key: value for key, value in found.items() if graph != "thinker" or not key.startswith(others)}


def load(bundle: Path, graph: str) -> onnx.ModelProto:
    return onnx.load(bundle / "graphs" / f"{graph}.onnx")


def array(tensor: onnx.TensorProto) -> Array:
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def spec_of(bundle: Path, graph: str) -> GraphSpec:
    return Bundle.open(bundle).manifest.graphs[graph]


def is_matrix(model: onnx.ModelProto, name: str) -> bool:
    """Whether an initializer is the right-hand side of a MatMul, which wants [in, out]; checkpoints store [out, in]."""
    uses = [(node.op_type, i) for node in model.graph.node for i, value in enumerate(node.input) if value == name]
    assert uses, f"{name} is never used"
    return ("MatMul", 1) in uses


# --- what a graph holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", PARTS)
def test_graph_is_standard_onnx(tiny_bundle: Path, graph: str) -> None:
    path = tiny_bundle / "graphs" / f"{graph}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    assert not any(attribute.type == onnx.AttributeProto.GRAPH for n in model.graph.node for attribute in n.attribute)
    assert str(Path.cwd()).encode() not in path.read_bytes(), "paths of the exporting machine are nobody's business"


@pytest.mark.parametrize("graph", PARTS)
def test_borders_are_those_of_the_spec(tiny_bundle: Path, graph: str) -> None:
    model, spec = (
        onnx.load(tiny_bundle / "graphs" / f"{graph}.onnx", load_external_data=False),
        spec_of(tiny_bundle, graph),
    )
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.BOOL: "bool"}
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            kind = value.type.tensor_type
            assert names[kind.elem_type] == tensor.dtype
            shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
            assert shape == tensor.shape, value.name
    for dim in {str(d).split("*")[-1] for t in (*spec.inputs, *spec.outputs) for d in t.shape if isinstance(d, str)}:
        assert dim in spec.dims
    used = {name for node in model.graph.node for name in node.input}
    assert {value.name for value in model.graph.input} <= used, "an unused input would be refused by builders"
    assert {tensor.name for tensor in model.graph.initializer} <= used


@pytest.mark.parametrize("graph", PARTS)
def test_weights_are_external_and_aligned(tiny_bundle: Path, graph: str) -> None:
    model, spec = (
        onnx.load(tiny_bundle / "graphs" / f"{graph}.onnx", load_external_data=False),
        spec_of(tiny_bundle, graph),
    )
    (data,) = spec.data
    size, end = (tiny_bundle / data).stat().st_size, 0
    for tensor in model.graph.initializer:
        values = int(np.prod(tensor.dims, dtype=np.int64))
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert len(tensor.raw_data) < 1024, f"{tensor.name} is inside the graph file"
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        assert place["location"] == Path(data).name
        assert offset % 4096 == 0
        assert offset >= end, "weights overlap"
        end = offset + length
        assert length == values * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    assert end == size > 500_000


@pytest.mark.parametrize(
    ("graph", "paths"),
    [
        ("audio_encoder", ("layers.1.self_attn.q_proj", "conv2", "proj")),
        ("vision_encoder", ("blocks.3.attn.q", "merger.mlp.2", "patch_embed.proj")),
        ("thinker", ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head", "model.norm")),
        ("talker", ("model.layers.2.self_attn.o_proj", "thinker_to_talker_proj", "codec_head")),
        ("dit", ("transformer_blocks.3.ff.ff.0", "input_embed.proj", "proj_out")),
        ("bigvgan", ("resblocks.17.convs2.2", "ups.5.0", "conv_post", "activation_post")),
    ],
)
def test_names_carry_the_module_path(
    tiny_checkpoint: Path, tiny_bundle: Path, graph: str, paths: tuple[str, ...]
) -> None:
    model = onnx.load(tiny_bundle / "graphs" / f"{graph}.onnx", load_external_data=False)
    nodes = [node.name for node in model.graph.node]
    values = [name for node in model.graph.node for name in node.output]
    assert len(set(nodes)) == len(nodes)
    for path in paths:
        assert any(name.startswith(path + "/") for name in nodes), f"no node of {path}"
        last = path in ("model.norm", "lm_head", "codec_head", "conv_post")  # its value is a graph output
        assert last or any(name.startswith(path + "/") for name in values), f"no value of {path}"
    assert all("/" in name for name in nodes)
    borders = {value.name for value in model.graph.output}
    assert all("/" in name for name in values if name not in borders)
    ckpt = Checkpoint.open(tiny_checkpoint)
    module = graph_definitions(ckpt.config, "fp32", CONTEXT, rk4_schedule(), ckpt.tied_embeddings)[graph].module()
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert all(tensor.name in own or "/" in tensor.name for tensor in model.graph.initializer)


# --- weights, by value ---------------------------------------------------------------------------------------


def expected_elsewhere(graph: str, key: str) -> bool:
    """Stored tensors that are no initializer of their own: checked by the tests below, or not needed."""
    return (
        (graph in ("thinker", "talker") and key == "model.embed_tokens.weight")
        or (graph == "audio_encoder" and key == "audio_bos_eos_token.weight")
        or key.endswith("inv_freq")
        or (graph == "dit" and key.startswith(("input_embed.spk_encoder.", "time_embed.")))
        or (graph == "dit" and (".attn_norm.linear." in key or key.startswith("norm_out.linear.")))
        or (graph == "bigvgan" and key.endswith((".act.alpha", ".act.beta")))
    )


@pytest.mark.parametrize("graph", PARTS)
def test_every_weight_by_value(tiny_checkpoint: Path, tiny_bundle: Path, graph: str) -> None:
    model = load(tiny_bundle, graph)
    found = {tensor.name: array(tensor) for tensor in model.graph.initializer}
    compared = 0
    for key, tensor in weights_of(tiny_checkpoint, graph).items():
        if expected_elsewhere(graph, key):
            assert key not in found
            continue
        value = tensor.float().numpy()
        if is_matrix(model, key):
            value = value.reshape(len(value), -1).T
        elif graph == "bigvgan" and value.ndim == 3 and ".ups." not in f".{key}":
            value = value[:, :, None]  # its convolutions see a row
        assert value.any(), f"{key}: a zero weight proves nothing"
        np.testing.assert_array_equal(found[key], value, err_msg=key)
        compared += value.size
    assert compared > 100_000


def test_square_weights_are_not_symmetric(tiny_checkpoint: Path) -> None:
    """So that the comparison above would see a transposed or a swapped one."""
    weights = weights_of(tiny_checkpoint, "thinker")
    square = {key: value.float() for key, value in weights.items() if value.ndim == 2 and len(set(value.shape)) == 1}
    assert len(square) >= 8
    for key, value in square.items():
        assert not torch.equal(value, value.T), key
        assert not any(torch.equal(value, other) for name, other in square.items() if name != key)


def test_vocoder_activations_by_value(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    found = {tensor.name: array(tensor) for tensor in load(tiny_bundle, "bigvgan").graph.initializer}
    stored = {
        k: v for k, v in weights_of(tiny_checkpoint, "bigvgan").items() if k.endswith((".act.alpha", ".act.beta"))
    }
    assert len(stored) == 2 * (18 * 6 + 1)
    for key, tensor in stored.items():
        path, _, name = key.rpartition(".act.")
        value = np.exp(tensor.double().numpy())
        wanted = value / np.pi if name == "alpha" else CURVE_FACTOR / (value + 1e-9)
        got = found[f"{path}.{'rate' if name == 'alpha' else 'height'}"]
        np.testing.assert_allclose(got[:, 0, 0], wanted, rtol=1e-6)


def test_only_windows_are_masked_in_pictures(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """Attention among all patches of a frame sees no padding, so that it needs no mask of patches by patches."""
    attention = [node for node in load(tiny_bundle, "vision_encoder").graph.node if node.op_type == "Attention"]
    config = Checkpoint.open(tiny_checkpoint).config.thinker_config.vision_config
    full = set(config.fullatt_block_indexes)
    assert 0 < len(full) < config.depth
    assert [len(node.input) for node in attention] == [3 if i in full else 4 for i in range(config.depth)]


def test_modulation_tables_by_value(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """AdaLN tables: the layer's own linear applied to the embedding of each time point, 1 added to the scales."""
    found = {tensor.name: array(tensor) for tensor in load(tiny_bundle, "dit").graph.initializer}
    weights = {key: value.double() for key, value in weights_of(tiny_checkpoint, "dit").items()}
    times = torch.tensor(rk4_schedule().table, dtype=torch.float64)
    frequency = torch.exp(-torch.arange(128, dtype=torch.float64) * np.log(10000) / 127)
    angle = 1000 * times[:, None] * frequency

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    hidden = torch.nn.functional.silu(linear(torch.cat((angle.sin(), angle.cos()), -1), "time_embed.time_mlp.0"))
    embedding = torch.nn.functional.silu(linear(hidden, "time_embed.time_mlp.2"))
    for layer in range(4):
        table = linear(embedding, f"transformer_blocks.{layer}.attn_norm.linear").unflatten(-1, (6, -1))
        table[:, (1, 4)] += 1
        assert float(table.std()) > 0.05
        np.testing.assert_allclose(found[f"transformer_blocks.{layer}.modulation"], table.numpy(), atol=3e-4)
    final = linear(embedding, "norm_out.linear").unflatten(-1, (2, -1))
    final[:, 0] += 1
    np.testing.assert_allclose(found["final_modulation"], final.numpy(), atol=3e-4)


@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_embedding_tables_by_value(tiny_checkpoint: Path, tiny_bundle: Path, part: str) -> None:
    stored = stored_weights(tiny_checkpoint)[f"{part}.model.embed_tokens.weight"]
    assert stored.dtype == torch.bfloat16, "the checkpoint is meant to be stored in BF16"
    bundle = Bundle.open(tiny_bundle)
    table = bundle.embedding("thinker" if part == "thinker" else "talker")
    np.testing.assert_array_equal(table.rows(np.arange(table.vocab_size)), stored.float().numpy())


# --- a second export -----------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the tiny bundle to export onto; nothing but it may be in its folder afterwards."""
    out = tmp_path / "work" / "bundle"
    shutil.copytree(tiny_bundle, out)
    yield out
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


@pytest.fixture
def rerun(tiny_checkpoint: Path, bundle: Path) -> Callable[..., ExportReport]:
    def export(**options: Any) -> ExportReport:
        report = export_checkpoint(tiny_checkpoint, bundle, **({"max_context": CONTEXT} | options))
        Bundle.open(bundle, verify=True)
        return report

    return export


def made(report: ExportReport) -> set[str]:
    return {graph.name for graph in report.graphs if not graph.skipped}


def manifest(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_rerun_skips_what_did_not_change(rerun: Callable[..., ExportReport], bundle: Path) -> None:
    before = contents(bundle)
    started = time.process_time()
    report = rerun()
    assert made(report) == set()
    assert time.process_time() - started < 10
    assert contents(bundle) == before, "a rerun gives the same bytes"


def test_context_is_the_decoders_business(rerun: Callable[..., ExportReport], bundle: Path) -> None:
    report = rerun(max_context=2048)
    assert made(report) == {"thinker", "talker"}
    assert manifest(bundle).kv.max_context == 2048
    assert manifest(bundle).graphs["talker"].dims["capacity"].max == 2048


def test_bounds_of_pixels_and_frames_change_no_graph(
    rerun: Callable[..., ExportReport], bundle: Path, tiny_checkpoint: Path
) -> None:
    before = manifest(bundle).vision
    assert made(rerun(max_pixels=5000, fps=1.0, max_frames=16)) == set()
    after = manifest(bundle).vision
    assert before is not None
    assert after is not None
    assert (after.min_pixels, after.max_pixels) == (min(5000, before.min_pixels), 5000)
    assert (after.video_min_pixels, after.video_max_pixels) == (4761, 5000)
    assert (after.video_fps, after.video_max_frames) == (1.0, 16)
    report = validate(bundle, tiny_checkpoint, graphs=["preprocess"]).report
    assert report.checks
    assert not [check.name for check in report.checks if check.status != "pass"], "the reference is bounded alike"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_graph_is_made_again(rerun: Callable[..., ExportReport], bundle: Path, damage: str) -> None:
    path = bundle / "graphs" / "audio_encoder.onnx.data"
    good = path.read_bytes()
    if damage == "flip":  # same size, same name: only the checksum tells
        path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    elif damage == "truncate":
        path.write_bytes(good[:-1])
    else:
        path.unlink()
    assert made(rerun()) == {"audio_encoder"}
    assert path.read_bytes() == good


def test_named_graphs_alone_are_made(rerun: Callable[..., ExportReport], bundle: Path) -> None:
    before = contents(bundle)
    report = rerun(graphs=["thinker"], precision="fp16")
    assert made(report) == {"thinker"}
    after = contents(bundle)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"graphs/thinker.onnx", "graphs/thinker.onnx.data", "bundle.json"}
    assert manifest(bundle).graphs["thinker"].precision == manifest(bundle).kv.dtype == "float16"
    assert manifest(bundle).graphs["talker"].precision == "float32"
    # and back, by way of a graph that is not named and in another precision than the one asked for
    assert made(rerun(graphs=["audio_encoder"])) == set()
    assert manifest(bundle).kv.dtype == "float16"


def test_named_graphs_do_not_mix_with_strangers(
    rerun: Callable[..., ExportReport], bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = contents(bundle)
    with pytest.raises(ExportError, match="holds a talker that is damaged, or was made from other weights"):
        rerun(graphs=["thinker"], max_context=2048)
    other = changed_copy(tiny_checkpoint, tmp_path / "other")
    with pytest.raises(ExportError, match="Export without --graphs, or to a new folder"):
        export_checkpoint(other, bundle, graphs=["thinker"], max_context=CONTEXT)
    assert contents(bundle) == before


def changed_copy(checkpoint: Path, target: Path) -> Path:
    """A copy of a checkpoint with one value of one audio-encoder weight changed in place."""
    shutil.copytree(checkpoint, target)
    key = "thinker.audio_tower.layers.1.fc1.weight"
    (shard,) = [path for path in target.glob("*.safetensors") if key.encode() in path.read_bytes()[:100_000]]
    with safe_open(shard, framework="pt") as file:
        value = file.get_tensor(key).view(torch.int16).numpy().tobytes()
    data = shard.read_bytes()
    start = data.index(value)
    assert data.count(value) == 1
    new = np.frombuffer(value, ml_dtypes.bfloat16).copy()
    new[7] = 1.5
    shard.write_bytes(data[:start] + new.tobytes() + data[start + len(value) :])
    return target


def test_changed_weight_is_exported_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(tiny_checkpoint, checkpoint)
    assert made(export_checkpoint(checkpoint, out, graphs=["audio_encoder"])) == {"audio_encoder"}
    assert made(export_checkpoint(checkpoint, out, graphs=["audio_encoder"])) == set()
    shutil.rmtree(checkpoint)
    changed_copy(tiny_checkpoint, checkpoint)
    assert made(export_checkpoint(checkpoint, out, graphs=["audio_encoder"])) == {"audio_encoder"}
    weight = next(t for t in load(out, "audio_encoder").graph.initializer if t.name == "layers.1.fc1.weight")
    assert array(weight)[7, 0] == 1.5


def test_a_moved_checkpoint_is_not_exported_again(tiny_checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere")  # keeps times of change
    assert made(export_checkpoint(tmp_path / "elsewhere", bundle, max_context=CONTEXT)) == set()


def test_files_of_others_are_left_in_the_folder(rerun: Callable[..., ExportReport], bundle: Path) -> None:
    (bundle / "notes").mkdir()
    (bundle / "notes" / "reply.wav").write_bytes(b"sound")
    assert made(rerun()) == set()
    assert (bundle / "notes" / "reply.wav").read_bytes() == b"sound"
    assert not any("reply.wav" in name for name in manifest(bundle).files)


def test_link_to_a_bundle_stays_a_link(tiny_checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    export_checkpoint(tiny_checkpoint, tmp_path / "link", graphs=["audio_encoder"], max_context=CONTEXT)
    assert (tmp_path / "link").is_symlink()
    Bundle.open(tmp_path / "link", verify=True)


def test_keys_follow_what_a_graph_is_made_from(tiny_checkpoint: Path) -> None:
    ckpt, solver = Checkpoint.open(tiny_checkpoint), rk4_schedule()

    def keys(
        precision: str = "fp32", context: int = 4096, source: str = "a", token2wav: str = "fp32"
    ) -> dict[str, str]:
        definitions = graph_definitions(
            ckpt.config, precision, context, solver, ckpt.tied_embeddings, token2wav=token2wav
        )
        return {name: reuse.graph_key(definition, source) for name, definition in definitions.items()}

    def changed(other: dict[str, str]) -> set[str]:
        return {name for name, key in keys().items() if other[name] != key}

    assert changed(keys()) == set()
    assert changed(keys(source="b")) == set(PARTS)
    assert changed(keys(context=2048)) == {"thinker", "talker"}
    assert changed(keys(precision="fp16", token2wav="fp16")) == set(PARTS)
    for precision in ("fp16", "bf16"):  # DiT and vocoder are FP32 in the reference, and stay it
        assert changed(keys(precision)) == set(PARTS) - {"dit", "bigvgan"}
    other = msgspec.structs.replace(solver, guidance_scale=0.7)
    dit = graph_definitions(ckpt.config, "fp32", 4096, other, False)["dit"]
    assert reuse.graph_key(dit, "a") != keys()["dit"]


def test_keys_cover_the_code_of_a_graph() -> None:
    """Code that makes graphs imports no part of the export package that is not in the key."""
    export = Path(reuse.__file__).parents[1]
    hashed, itself = {"models", "graphs", "checkpoint"}, "source_code"
    for package in sorted(hashed):
        for file in (export / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    folder = file.parents[node.level - 1]
                    names = [node.module] if node.module else [alias.name for alias in node.names]
                    for name in names:
                        first = (folder / name.replace(".", "/")).relative_to(export).parts[0]
                        assert first in {*hashed, itself}, f"{file.name} imports {first}"


# --- precision -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "bundle"
    export_checkpoint(tiny_checkpoint, out, precision="fp16", max_context=CONTEXT)
    return out


def test_half_borders_are_single_but_for_the_cache(half_bundle: Path) -> None:
    for name, spec in manifest(half_bundle).graphs.items():
        half = not PARTS[name].float32  # DiT and vocoder stay as they are published
        assert spec.precision == ("float16" if half else "float32")
        for tensor in (*spec.inputs, *spec.outputs):
            cache = PARTS[name].decodes and tensor.name.startswith(("past_", "present_"))
            assert tensor.dtype in (("float16",) if cache else ("float32", "int64", "bool")), (name, tensor.name)
        model = onnx.load(half_bundle / "graphs" / f"{name}.onnx", load_external_data=False)
        matrices = {n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Conv", "ConvTranspose")}
        kinds = {t.data_type for t in model.graph.initializer if t.name in matrices}
        assert kinds == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}


def test_token2wav_is_half_where_that_is_asked(tiny_half_bundles: dict[str, Path], omniport: Omniport) -> None:
    assert {spec.precision for spec in manifest(tiny_half_bundles["fp16"]).graphs.values()} == {"float16"}
    code, _, err = omniport("export", "nowhere", "out", "--token2wav", "fp16")
    assert (code, "--token2wav fp16 goes with --precision fp16 or bf16" in err) == (2, True), err


def test_half_weights_are_rounded_once(tiny_checkpoint: Path, half_bundle: Path) -> None:
    found = {tensor.name: array(tensor) for tensor in load(half_bundle, "thinker").graph.initializer}
    for key, tensor in weights_of(tiny_checkpoint, "thinker").items():
        if key.endswith("_proj.weight"):
            np.testing.assert_array_equal(found[key], tensor.half().numpy().T)


def logits(bundle: Path) -> NDArray[np.float32]:
    """The thinker's logits after a prompt of 40 tokens, on the CPU."""
    with OmniSession.open(bundle, backend="ort-cpu") as session:
        rng = np.random.default_rng(5)
        ids = rng.integers(0, 768, 40)
        graph = session.backend.graph("thinker")
        outputs = graph.run(
            {
                "inputs_embeds": session.bundle.embedding("thinker").rows(ids)[None],
                "position_ids": np.broadcast_to(np.arange(40, dtype=np.int64), (3, 1, 40)).copy(),
                "kv_positions": np.arange(40, dtype=np.int64),
                "write_index": np.zeros(1, np.int64),
            },
            graph.new_cache(64),
        )
    return np.array(outputs["logits"][0], np.float32)


def test_half_thinker_is_close_to_single(tiny_bundle: Path, half_bundle: Path) -> None:
    """Half precision rounds each activation to 11 bits: 5e-4 relative. Four layers of about ten roundings each add up,
    as independent errors do, to some 3e-3; 1e-2 leaves room for the residual's growth and none for a wrong weight."""
    single, half = logits(tiny_bundle), logits(half_bundle)
    energy = float(np.sqrt(np.mean(single**2)))
    assert energy > 0.1
    error = float(np.sqrt(np.mean((half - single) ** 2))) / energy
    assert 1e-6 < error < 1e-2


def test_half_bundle_speaks_on_the_cpu(half_bundle: Path) -> None:
    from omniport.runtime import AudioChunk, Done, SamplingConfig

    short, sound = SamplingConfig(max_new_tokens=4), []
    with OmniSession.open(half_bundle, backend="ort-cpu") as session:
        message = {"role": "user", "content": "Hello there"}
        for event in session.reply([message], thinker=short, talker=SamplingConfig(max_new_tokens=8)):
            if isinstance(event, AudioChunk):
                sound.append(event.samples)
            elif isinstance(event, Done):
                assert event.codec_ids
    samples = np.concatenate(sound)
    assert np.isfinite(samples).all()
    assert float(np.sqrt(np.mean(samples**2))) > 0.01


def test_bfloat16_keeps_token2wav_single_and_is_refused_on_the_cpu(
    rerun: Callable[..., ExportReport], bundle: Path, tiny_checkpoint: Path
) -> None:
    report = rerun(precision="bf16")
    assert made(report) == set(PARTS) - {"dit", "bigvgan"}, "token2wav is the same under fp32 and bf16"
    graphs = manifest(bundle).graphs
    assert {name for name, spec in graphs.items() if spec.precision == "float32"} == {"dit", "bigvgan"}
    assert manifest(bundle).kv.dtype == "bfloat16"
    assert {t.dtype for t in graphs["thinker"].inputs} == {"float32", "int64", "bfloat16"}
    found = {tensor.name: tensor for tensor in load(bundle, "thinker").graph.initializer}
    stored = weights_of(tiny_checkpoint, "thinker")["model.layers.0.mlp.up_proj.weight"]
    tensor = found["model.layers.0.mlp.up_proj.weight"]
    assert tensor.data_type == onnx.TensorProto.BFLOAT16
    np.testing.assert_array_equal(array(tensor).astype(np.float32), stored.float().numpy().T)
    with (
        pytest.raises(BackendError, match=r"no CPU kernels: export with --precision fp32 \(or fp16\)"),
        OmniSession.open(bundle, backend="ort-cpu") as session,
    ):
        list(session.reply([{"role": "user", "content": "Hello"}], speak=False))
