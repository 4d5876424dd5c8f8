"""The mutation proof: faults that ports of this model really had, planted one at a time; validate finds each.

Faults of a graph are planted in the ONNX file of a copied bundle whose bundle.json is made to match, so that nothing
but the numbers gives them away. Faults of the runtime are planted in the function that would have them.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from omniport.calib import Calibration, quantize
from omniport.export.validation.types import FAIL, ValidationReport
from omniport.export.validation.validate import group_names, validate
from omniport.runtime.bundle.manifest import SolverSpec
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.generation.entries import Tokens
from omniport.runtime.media import image as vision
from omniport.runtime.speech import ode as solver
from omniport.runtime.speech.token2wav import MelPiece, Token2Wav
from onnx import TensorProto, helper, numpy_helper
from support.calibrations import calibrate_bundle
from support.planted import constant, edit_graph, initializer, insert_after, producer, rope_on_all_heads
from support.spoken_questions import WREN

Floats = NDArray[np.float32]
Graph = onnx.GraphProto


# faults in graphs


def mrope_section(graph: Graph, folder: Path) -> None:
    """Time, height and width take each other's frequencies."""
    tensor = initializer(graph, "model.rope/Gather.input1")
    axis = numpy_helper.to_array(tensor)
    assert set(axis.tolist()) == {0, 1, 2}
    tensor.CopyFrom(numpy_helper.from_array(2 - axis, tensor.name))


def guidance_sign(graph: Graph, folder: Path) -> None:
    """p - (p - null) * 0.5"""
    scaled = producer(graph, producer(graph, "velocity").input[1])
    assert scaled.op_type == "Mul"
    value = producer(graph, scaled.input[1]).attribute[0]
    assert numpy_helper.to_array(value.t) == np.float32(0.5)
    value.t.CopyFrom(numpy_helper.from_array(np.asarray(-0.5, np.float32)))


def swapped_weight(graph: Graph, folder: Path) -> None:
    """Two layers have each other's query projection."""
    first, second = (initializer(graph, f"model.layers.{i}.self_attn.q_proj.weight") for i in (1, 2))
    assert list(first.dims) == list(second.dims)
    held = list(first.external_data)
    assert held
    kept = [(entry.key, entry.value) for entry in second.external_data]
    del second.external_data[:]
    second.external_data.extend(held)
    del first.external_data[:]
    for key, value in kept:
        first.external_data.add(key=key, value=value)


def transposed_weight(graph: Graph, folder: Path) -> None:
    """A square matrix [in, out] stored as [out, in]: every shape still fits."""
    matrices = (t for t in graph.initializer if t.name.endswith("weight") and len(t.dims) == 2)
    tensor = next(t for t in matrices if t.dims[0] == t.dims[1])
    where = {entry.key: entry.value for entry in tensor.external_data}
    size = int(tensor.dims[0])
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where["offset"]))
        weight = np.frombuffer(file.read(4 * size * size), np.float32).reshape(size, size)
        file.seek(int(where["offset"]))
        file.write(np.ascontiguousarray(weight.T).tobytes())
    assert np.abs(weight - weight.T).max() > 1e-3


def kv_slot(graph: Graph, folder: Path) -> None:
    """Keys and values are written one slot behind their place; the mask still counts from the right one."""
    graph.node.insert(0, helper.make_node("Add", ["write_index", constant(graph, "one", 1)], ["write_index/off"]))
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert scatters
    for node in scatters:
        node.input[2] = "write_index/off"


def silence(graph: Graph, folder: Path) -> None:
    """A valid waveform of the right length, with nothing in it."""
    insert_after(graph, "wav", helper.make_node("Mul", ["wav/planted", constant(graph, "zero", 0.0)], ["wav"]))


def overflow(graph: Graph, folder: Path) -> None:
    """An activation passes through a float16 that is too small for its largest values."""
    value = "model.layers.1.mlp.down_proj/MatMul:0"
    scale = constant(graph, "scale", 3e4)
    insert_after(
        graph,
        value,
        helper.make_node("Mul", [f"{value}/planted", scale], ["overflow/up"]),
        helper.make_node("Cast", ["overflow/up"], ["overflow/half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["overflow/half"], ["overflow/back"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["overflow/back", scale], [value]),
    )


# faults in the runtime


@contextmanager
def rk4_weight() -> Iterator[None]:
    """The last stage of the 3/8 rule with the weight of the classic method's outer stages."""

    def wrong(spec: SolverSpec, velocity: solver.Velocity, initial: Floats) -> Floats:
        state, grid = initial, np.asarray(spec.grid, np.float32)
        for i, (t1, t2, t3, t4) in enumerate(spec.stages):
            h = grid[i + 1] - grid[i]
            k1 = velocity(t1, state)
            k2 = velocity(t2, (state + h * k1 / 3).astype(np.float32))
            k3 = velocity(t3, (state + h * (k2 - k1 / 3)).astype(np.float32))
            k4 = velocity(t4, (state + h * (k1 - k2 + k3)).astype(np.float32))
            state = (state + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6).astype(np.float32)
        return state

    with _everywhere("solve", solver.solve, wrong):
        yield


@contextmanager
def no_zeroing() -> Iterator[None]:
    """The talker is conditioned on placeholder embeddings where media are."""
    with mock.patch.object(Tokens, "media_mask", property(lambda self: np.zeros(len(self), np.bool_))):
        yield


@contextmanager
def ragged_windows() -> Iterator[None]:
    """Windows are counted from the far edges: right for whole windows, wrong for ragged images."""
    right = vision.window_layout

    def wrong(rows: int, columns: int, merge: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        index, valid = right(rows, columns, merge, window)
        if valid.all():
            return index, valid
        patches, unit = rows * columns, merge * merge
        flipped = patches - unit - index // unit * unit + index % unit  # blocks count down, patches in them up
        return np.where(valid.reshape(-1), flipped, patches), valid

    with mock.patch.object(vision, "window_layout", wrong):
        yield


@contextmanager
def first_chunk_twice() -> Iterator[None]:
    """The stream repeats its first chunk."""
    right = Token2Wav.vocode

    def wrong(self: Token2Wav, piece: MelPiece) -> Floats:
        samples = right(self, piece)
        return np.concatenate([samples, samples]) if self._streaming and not piece.skip else samples

    with mock.patch.object(Token2Wav, "vocode", wrong):
        yield


@contextmanager
def _everywhere(name: str, old: object, new: object) -> Iterator[None]:
    """Replace a function in every module of omniport that has imported it."""
    modules = [module for key, module in list(sys.modules.items()) if key.startswith("omniport.")]
    with ExitStack() as stack:
        for module in modules:
            if vars(module).get(name) is old:
                stack.enter_context(mock.patch.object(module, name, new))
        yield


# the proof


@dataclass(frozen=True)
class Fault:
    """A fault, what is run to find it, and the stage that must be named."""

    name: str
    groups: tuple[str, ...]
    stage: str
    graph: str = ""
    edit: Callable[[Graph, Path], None] | None = None
    patch: Callable[[], AbstractContextManager[None]] = nullcontext


FAULTS = [
    Fault("mrope_section order", ("thinker",), "thinker", "thinker", mrope_section),
    Fault("RK4 weight", ("speech",), "solver", patch=rk4_weight),
    Fault("guidance sign", ("dit",), "dit", "dit", guidance_sign),
    Fault("a swapped weight", ("talker",), "talker", "talker", swapped_weight),
    Fault("a transposed square weight", ("audio_encoder",), "audio_encoder", "audio_encoder", transposed_weight),
    Fault("missing zeroing of multimodal embeddings", ("end_to_end",), "conditioning", patch=no_zeroing),
    Fault("wrong window index for a ragged image", ("vision_encoder",), "vision_encoder", patch=ragged_windows),
    Fault("KV written one slot off", ("thinker",), "thinker", "thinker", kv_slot),
    Fault("first chunk repeated in the vocoder stream", ("speech",), "speech", patch=first_chunk_twice),
    Fault("RoPE on all DiT heads", ("dit",), "dit", "dit", rope_on_all_heads),
    Fault("silence", ("bigvgan",), "bigvgan", "bigvgan", silence),
    Fault("FP16 overflow to inf", ("talker",), "talker", "talker", overflow),
]


#: one for every graph, all at once; that of the vision encoder is in what it is fed
COARSE = (
    "mrope_section order",
    "a swapped weight",
    "a transposed square weight",
    "RoPE on all DiT heads",
    "silence",
    "wrong window index for a ragged image",
)


def failed_stages(report: ValidationReport) -> list[str]:
    """Stages with a failed check, in the order in which they failed."""
    return list(dict.fromkeys(check.stage for check in report.checks if check.status == FAIL))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_there_are_twelve_faults() -> None:
    assert len(FAULTS) == 12
    assert len({fault.name for fault in FAULTS}) == 12
    assert all(group in group_names() for fault in FAULTS for group in fault.groups)


@pytest.mark.slow
def test_the_clean_bundle_passes(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """Without a fault the very same groups hold: each failure below is the fault's."""
    groups = tuple(dict.fromkeys(group for fault in FAULTS for group in fault.groups))
    report, _ = validate(tiny_bundle, tiny_checkpoint, graphs=groups)
    assert report.ok, [(c.stage, c.name, c.message) for c in report.checks if c.status == FAIL]
    assert {check.stage for check in report.checks} >= {fault.stage for fault in FAULTS} - {"solver"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_and_named(
    fault: Fault, bundle_copy: Path, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    if fault.edit is not None:
        edit_graph(bundle_copy, fault.graph, fault.edit)
    with fault.patch():
        report, _ = validate(bundle_copy, tiny_checkpoint, graphs=fault.groups)
    assert not report.ok
    stages = failed_stages(report)
    assert fault.stage in stages
    if fault.graph:
        assert stages == [fault.graph], "a fault in one graph is that graph's"
    failed = [check for check in report.checks if check.status == FAIL and check.stage == fault.stage]
    assert all("stopped by an error" not in check.name for check in failed), failed[0].message
    assert all(check.message for check in failed)


@pytest.fixture(scope="module")
def wren_ranges(wren_bundle: Path) -> Calibration:
    return calibrate_bundle(wren_bundle)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8"])
def test_faults_are_found_in_coarse_graphs(
    recipe: str, wren_bundle: Path, wren_ranges: Calibration, tmp_path: Path
) -> None:
    """On trained weights, whose loss by 8 and 4 bits is larger than what most of these faults do."""
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    quantize(wren_bundle, clean, recipe, calibration=wren_ranges)
    report, _ = validate(clean, WREN, graphs=list(PARTS))
    assert report.ok, [(c.stage, c.name, c.message) for c in report.checks if c.status == FAIL]
    faults = [fault for fault in FAULTS if fault.name in COARSE]
    source = Path(shutil.copytree(wren_bundle, tmp_path / "source"))
    for fault in faults:
        if fault.edit is not None:
            edit_graph(source, fault.graph, fault.edit)
    quantize(source, broken, recipe, calibration=wren_ranges)
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault.patch())
        report, _ = validate(broken, WREN, graphs=list(PARTS))
    assert sorted(failed_stages(report)) == sorted(PARTS)
    weights = [c.message for c in report.checks if c.status == FAIL and c.stage == "talker" and "weights in" in c.name]
    assert len(weights) == 1
    assert re.search(r"model\.layers\.[12]\.self_attn\.q_proj\.weight is not the checkpoint's", weights[0])
