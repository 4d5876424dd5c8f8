"""The code that calls TensorRT, over modules that offer what each real release was recorded to offer."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from omniport.export.devices.catalog import RTX_RUNS_ON
from omniport.export.devices.detect import find_target
from omniport.export.tensorrt import builder_api, engine_builder, network
from omniport.export.tensorrt.builder_api import Api
from omniport.export.tensorrt.engine_builder import build_engine
from omniport.runtime.backends.tensorrt import runtime_api
from omniport.runtime.backends.tensorrt.runtime_api import TrtRuntime
from omniport.runtime.bundle.graph_spec import GraphSpec
from omniport.runtime.errors import BackendError, BuildError
from onnx import helper
from support.onnx_graphs import cache_model, make_model, matmul, plain_model, spec, tensor
from support.recorded_tensorrt import RecordedTensorRT

from scripts.tensorrt_contract import BINDINGS, name_of, read_record, record_of, recorded

RECORDED = read_record()
every = pytest.mark.parametrize("name", RECORDED)
SOURCES = (builder_api, engine_builder, network, runtime_api)
#: names of ours, and of the standard library, that a class of TensorRT has as well
OURS = {"builder", "logger", "nbytes", "write"}
#: for releases without the older `device_memory`, of which there is none yet
NOT_YET = {"set_device_memory"}


@pytest.fixture(autouse=True)
def loggers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_api, "_loggers", {})


def module_of(name: str, null: tuple[str, ...] = ()) -> Any:
    return RecordedTensorRT(name, RECORDED[name], null)


def builder_of(name: str) -> str:
    return name.partition(" ")[0]


def network_of(module: Any, made: GraphSpec, kind: str) -> None:
    """Let the parser make what a spec says, with one layer."""
    dtypes = network._DTYPES

    def one(given: Any, is_input: bool) -> Any:
        shape = [64 if size == "capacity" else -1 if isinstance(size, str) else size for size in given.shape]
        dtype = getattr(module.DataType, dtypes[given.dtype])
        return module.make("ITensor", name=given.name, dtype=dtype, shape=shape, is_network_input=is_input)

    sides = {
        "input": [one(given, True) for given in made.inputs],
        "output": [one(given, False) for given in made.outputs],
    }
    reads, writes = sides["input"].__getitem__, sides["output"].__getitem__
    layer = module.make(
        "ILayer",
        type=getattr(module.LayerType, kind),
        num_inputs=len(made.inputs),
        get_input=reads,
        get_output=writes,
    )
    module.gives["INetworkDefinition.num_layers"] = 1
    module.gives["INetworkDefinition.get_layer"] = lambda *_: layer
    for side, tensors in sides.items():
        module.gives[f"INetworkDefinition.num_{side}s"] = len(tensors)
        module.gives[f"INetworkDefinition.get_{side}"] = lambda _, i, tensors=tensors: tensors[i]


def compiles(module: Any, wanted: Callable[[], None] = lambda: None) -> None:
    """Let the builder report progress and give an engine, as the real ones do."""

    def step(config: Any) -> None:
        monitor = config.progress_monitor
        monitor.phase_start("build", None, 2)
        assert monitor.step_complete("build", 0)
        monitor.phase_finish("build")
        wanted()

    def whole(_: Any, parsed: Any, config: Any) -> bytes:
        step(config)
        return b"engine"

    def streamed(_: Any, parsed: Any, config: Any, writer: Any) -> bool:
        step(config)
        return bool(writer.write(memoryview(b"engine"), 6) == 6)

    module.gives["Builder.build_serialized_network"] = whole
    module.gives["Builder.build_serialized_network_to_stream"] = streamed
    limits: dict[Any, int] = {}
    module.gives["IBuilderConfig.set_memory_pool_limit"] = lambda _, pool, size: limits.update({pool: size})
    module.gives["IBuilderConfig.get_memory_pool_limit"] = lambda _, pool: limits[pool]
    module.gives["ITimingCache.serialize"] = b"timings"
    module.gives["OnnxParser.num_errors"] = 1
    module.gives["ParserError.code"] = "UNSUPPORTED_NODE"


def built(module: Any, folder: Path, model: onnx.ModelProto, made: GraphSpec, kind: str, **options: Any) -> bytes:
    network_of(module, made, kind)
    compiles(module)
    onnx.save(model, folder / "graph.onnx", save_as_external_data=True, size_threshold=64, location="weights")
    builder = "tensorrt" if module.origin.startswith("tensorrt ") else "tensorrt-rtx"
    target = find_target("rtx-4090" if builder == "tensorrt-rtx" else "jetson-orin-nano-8gb")
    cache = folder / "timings.cache"
    build_engine(Api(builder, module), folder / "graph.onnx", made, target, folder / "e", timing_cache=cache, **options)
    if builder == "tensorrt":
        assert cache.read_bytes() == b"timings"
    return (folder / "e").read_bytes()


def lowered_model() -> tuple[onnx.ModelProto, GraphSpec]:
    model, made = plain_model()
    return make_model([matmul()], made.inputs, made.outputs, list(model.graph.initializer), opset=18), made


def attention_model() -> tuple[onnx.ModelProto, GraphSpec]:
    heads = tuple(tensor(name, "batch", 2, 16, 8) for name in ("q", "k", "v"))
    outputs = (tensor("y", "batch", 2, 16, 8),)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="layers.0/Attention")
    return make_model([node], heads, outputs), spec("dit", heads, outputs)


def exercise_building(module: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    assert built(module, folder, *lowered_model(), "MATRIX_MULTIPLY") == b"engine"
    native = Api(builder_of(module.origin), module).features
    if native.native_cache:
        assert built(module, folder, *cache_model(), "KV_CACHE_UPDATE") == b"engine"
    if native.native_attention:
        assert built(module, folder, *attention_model(), "ATTENTION_INPUT") == b"engine"
    for step in ("load_model_proto", "parse_model_proto", "load_initializer", "parse"):
        module.gives[f"OnnxParser.{step}"] = False
    with pytest.raises(BuildError, match="text"):
        built(module, folder, *lowered_model(), "MATRIX_MULTIPLY")


def exercise_running(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_api, "import_builder", lambda _: module)
    (folder / "engine").write_bytes(b"engine")
    module.gives.update(
        {
            "ICudaEngine.num_io_tensors": 1,
            "ICudaEngine.get_tensor_dtype": lambda *_: module.DataType.HALF,
            "ICudaEngine.get_tensor_mode": lambda *_: module.TensorIOMode.INPUT,
            "ICudaEngine.get_tensor_shape": (-1, 8),
            "IExecutionContext.get_tensor_shape": (4, 8),
            "IExecutionContext.update_device_memory_size_for_shapes": 512,
            "IRuntimeCache.serialize": b"kernels",
        }
    )
    engine = TrtRuntime(builder_of(module.origin)).load(folder / "engine")
    assert engine.tensors["text"] == runtime_api.EngineTensor("text", "float16", (-1, 8), True)
    assert engine.compiles is (builder_of(module.origin) == "tensorrt-rtx")
    assert engine.take_kernels(b"kernels") is engine.compiles
    assert engine.kernels() == (b"kernels" if engine.compiles else b"")
    aliases = hasattr(module.ICudaEngine, "get_aliased_input_tensor")
    assert engine.aliased_input("text") == ("text" if aliases else None)
    for fixed in (False, True):
        context = engine.context(fixed)
        context.use_profile(1, 7)
        context.set_shape("text", (4, 8))
        assert context.shape("text") == (4, 8)
        context.set_address("text", 4096)
        assert context.scratch_bytes() == 512
        context.set_scratch(4096, 512)
        assert context.capturable(7)
        context.enqueue(7)
    module.gives["IExecutionContext.update_device_memory_size_for_shapes"] = 0
    module.gives["ICudaEngine.device_memory_size_v2"] = 512
    with pytest.raises(BackendError, match="cannot tell the memory"):
        context.scratch_bytes()


@every
def test_engines_are_built_by_calls_that_the_release_has(name: str, tmp_path: Path) -> None:
    exercise_building(module_of(name), tmp_path)


@every
def test_engines_run_by_calls_that_the_release_has(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exercise_running(module_of(name), tmp_path, monkeypatch)


@every
@pytest.mark.parametrize("null", ["Runtime", "Builder", "OnnxParser"])
def test_what_cannot_be_made_is_told_with_the_reason(
    name: str, null: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is too old, or no GPU: TensorRT logs it, and Python hears a TypeError of the constructor."""
    module = module_of(name, null=(null,))
    if null == "Runtime":
        monkeypatch.setattr(runtime_api, "import_builder", lambda _: module)
        with pytest.raises(BackendError, match="gives no runtime: it gives no reason"):
            TrtRuntime(builder_of(name))
        return
    with pytest.raises(BackendError, match=r"gives no (builder|parser): it gives no reason"):
        built(module, tmp_path, *lowered_model(), "MATRIX_MULTIPLY")


def test_a_call_with_wrong_arguments_is_not_taken_for_one_that_gives_nothing() -> None:
    with pytest.raises(TypeError, match="takes 0"):
        runtime_api.attempt(lambda: None, 1)


def test_every_name_of_tensorrt_in_the_sources_is_used_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched, offered = set(), set()
    for name, entry in RECORDED.items():
        monkeypatch.setattr(runtime_api, "_loggers", {})
        module = module_of(name)
        exercise_building(module, tmp_path / name)
        exercise_running(module, tmp_path, monkeypatch)
        touched |= module.touched
        for kind, offers in entry["classes"].items():
            offered |= {kind, *offers.get("members", ()), *offers.get("attributes", ())}
    named = {
        node.attr
        for source in SOURCES
        for node in ast.walk(ast.parse(Path(str(source.__file__)).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert named & offered - OURS - NOT_YET <= touched


@every
def test_names_of_dtypes_and_capabilities(name: str) -> None:
    classes = RECORDED[name]["classes"]
    assert set(runtime_api._DTYPES) <= set(classes["DataType"]["members"])
    assert {short: long for long, short in network._DTYPES.items()} == runtime_api._DTYPES
    if builder_of(name) == "tensorrt-rtx":
        known = {f"SM{capability.replace('.', '')}" for capability in RTX_RUNS_ON}
        assert known <= set(classes["ComputeCapability"]["members"])


def test_the_installed_package_is_as_recorded() -> None:
    module: Any = pytest.importorskip("tensorrt_rtx")
    entry = RECORDED.get(f"tensorrt-rtx {module.__version__}")
    if entry is None:
        pytest.skip(f"TensorRT-RTX {module.__version__} was not recorded: python -m scripts.tensorrt_contract")
    assert record_of(module) == entry["classes"]


@pytest.mark.network
@pytest.mark.parametrize(("package", "version"), BINDINGS)
def test_the_real_bindings_are_as_recorded(package: str, version: str) -> None:
    """`make tensorrt-contract`."""
    try:
        found = recorded(package, version)
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{package} {version}: {error.stderr}") from error
    assert found == RECORDED[name_of(package, version)]["classes"]
