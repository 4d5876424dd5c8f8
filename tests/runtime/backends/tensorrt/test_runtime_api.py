"""The real TensorRT-RTX and CUDA packages, as far as they go without a GPU: names, arguments, errors."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from omniport.export.devices.detect import find_target
from omniport.export.tensorrt.build import build_bundle
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt import runtime_api as trt_runtime
from omniport.runtime.backends.tensorrt.cuda import CudaDriver
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
    with pytest.raises(BackendError, match="NVIDIA driver is missing or older"):
        open_backend("tensorrt-rtx", Bundle.open(root))
    with pytest.raises(BackendError, match=r"pip install 'omniport\[trt\]'"):
        open_backend("tensorrt", Bundle.open(root))


@no_gpu
def test_cuda_bindings_take_what_the_driver_gives_them() -> None:
    """Wrong arguments are a TypeError; right ones get as far as the driver, which is missing."""
    with pytest.raises(BackendError, match=r"InsufficientDriver|NoDevice"):
        CudaDriver()
    driver = CudaDriver.__new__(CudaDriver)
    import cuda.bindings.runtime as api

    driver._api = api
    calls: list[tuple[Any, ...]] = [
        (driver.capability,),
        (driver.allocate, 256),
        (driver.allocate_host, 256),
        (driver.to_device, 1, 2, 3, 4),
        (driver.to_host, 1, 2, 3, 4),
        (partial(driver.copy_rows, to_pitch=4, pitch=5, width=6, rows=7), 1, 2, 3),
        (driver.zero, 1, 2, 3),
        (driver.create_stream,),
        (driver.synchronize, 1),
        (driver.capture, 1, lambda: None),
        (driver.launch, 1, 2),
    ]
    for function, *arguments in calls:
        with pytest.raises(BackendError, match="update the driver"):
            function(*arguments)
    for quiet in (driver.free, driver.free_host, driver.destroy_stream, driver.destroy_graph):
        quiet(0)


class FakeApi:
    """cuda.bindings.runtime's capture calls, to see in which order they come and what becomes of errors."""

    class cudaError_t:
        cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInsufficientDriver, cudaErrorNoDevice, bad = range(5)

        def __init__(self, value: int) -> None:
            self.name = f"error{value}"

    class cudaStreamCaptureMode:
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing = ""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name == "cudaGetErrorString":
                return 0, b"text"
            if name == "cudaMemGetInfo":
                return 0, 10, 20
            status = (1 if name == "cudaMalloc" else 4) if name == self.failing else 0
            return status, 77

        return call


def test_captures_always_end() -> None:
    driver, api = CudaDriver.__new__(CudaDriver), FakeApi()
    driver._api = api
    assert driver.capture(3, lambda: None) == 77
    assert api.calls == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy"]
    api.calls.clear()

    def breaks() -> None:
        raise BackendError("the engine refuses")

    with pytest.raises(BackendError, match="the engine refuses"):
        driver.capture(3, breaks)
    assert api.calls == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphDestroy"]
    api.calls.clear()
    api.failing = "cudaGraphInstantiate"
    with pytest.raises(BackendError, match=r"cudaGraphInstantiate .* error4"):
        driver.capture(3, lambda: None)
    assert api.calls[-1] == "cudaGraphDestroy"
    api.failing = "cudaMalloc"
    with pytest.raises(BackendError, match=r"no room for 1,000 bytes more \(10 of 20 are free\).*max_context"):
        driver.allocate(1000)
    assert "cudaGetLastError" in api.calls


def test_installed() -> None:
    assert "tensorrt-rtx" in installed_runtimes()
