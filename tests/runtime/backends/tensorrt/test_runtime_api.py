"""The real TensorRT-RTX package, as far as they go without a GPU: names, arguments, errors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from omniport.export.devices.detect import find_target
from omniport.export.tensorrt.build import build_bundle
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt import runtime_api as trt_runtime
from omniport.runtime.backends.tensorrt.runtime_api import USED, TrtRuntime, installed_runtimes
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import gpu_capability
from support.onnx_graphs import cache_model, plain_model, put_graphs

no_gpu = pytest.mark.skipif(gpu_capability() is not None, reason="says what happens without a GPU, and here is one")


def test_every_name_that_is_used_exists() -> None:
    module = TrtRuntime("tensorrt-rtx").module
    for kind, names in USED.items():
        for name in names:
            assert hasattr(getattr(module, kind), name), f"{kind}.{name}"
    assert hasattr(module.IExecutionContext, "is_stream_capturable")
    assert hasattr(module.ICudaEngine, "get_aliased_input_tensor")
    for name in ("EAGER", "LAZY"):
        assert hasattr(module.DynamicShapesKernelSpecializationStrategy, name)
    for name in ("dynamic_shapes_kernel_specialization_strategy", "set_execution_context_allocation_strategy"):
        assert hasattr(module.IRuntimeConfig, name)
    assert set(trt_runtime._DTYPES) <= set(dir(module.DataType))


def test_source_uses_what_is_checked() -> None:
    """Every attribute of an engine or context that the source reads is in USED, or is looked for before."""
    tree = ast.parse(Path(trt_runtime.__file__).read_text())
    read = {(ast.unparse(n.value), n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    optional = {"get_aliased_input_tensor", "create_runtime_config"}
    for kind, variables in (("ICudaEngine", {"engine", "self._engine"}), ("IExecutionContext", {"self._context"})):
        found = {name for variable, name in read if variable in variables}
        assert found - optional == set(USED[kind])


@no_gpu
def test_a_built_engine_does_not_load_without_a_gpu(tmp_path: Path) -> None:
    root = put_graphs(tmp_path / "bundle", plain_model("dit"), cache_model())
    report = build_bundle(Bundle.open(root), find_target("rtx-4090"))
    runtime = TrtRuntime("tensorrt-rtx")
    assert runtime.version == report.version
    for built in report.graphs:
        with pytest.raises(BackendError, match=r"tensorrt-rtx .* cannot load .*engine: .*CUDA driver"):
            runtime.load(built.path)
    with pytest.raises(BackendError, match="the CUDA driver does not load"):
        open_backend("tensorrt-rtx", Bundle.open(root))
    with pytest.raises(BackendError, match=r"pip install 'omniport\[trt\]'"):
        open_backend("tensorrt", Bundle.open(root))


def test_installed() -> None:
    assert "tensorrt-rtx" in installed_runtimes()
