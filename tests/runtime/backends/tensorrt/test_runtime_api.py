"""The real TensorRT-RTX package, as far as they go without a GPU: names, arguments, errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omniport.export.devices.detect import find_target
from omniport.export.tensorrt.build import build_bundle
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt import runtime_api as trt_runtime
from omniport.runtime.backends.tensorrt.runtime_api import TrtRuntime
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import gpu_capability
from support.onnx_graphs import cache_model, plain_model, put_graphs

no_gpu = pytest.mark.skipif(gpu_capability() is not None, reason="says what happens without a GPU, and here is one")


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


class Messages:
    def reason(self) -> str:
        return "its reason"


def context_over(context: Any, engine_bytes: int = 512) -> Any:
    """A context of the runtime's over a stand-in for TensorRT's."""
    runtime: Any = SimpleNamespace(builder="tensorrt", messages=Messages())
    return trt_runtime._TrtContext(runtime, SimpleNamespace(device_memory_size_v2=engine_bytes), context, None)


def test_results_that_tell_of_failure() -> None:
    silent = SimpleNamespace(update_device_memory_size_for_shapes=lambda: 0)
    with pytest.raises(BackendError, match="cannot tell the memory that a run needs: its reason"):
        context_over(silent).scratch_bytes()
    assert context_over(silent, engine_bytes=0).scratch_bytes() == 0  # it never needs any
    unknown = SimpleNamespace(infer_shapes=list, get_tensor_shape=lambda _: (1, -1))
    with pytest.raises(BackendError, match=r"does not know the shape of 'y' \(\[1, -1\]\): its reason"):
        context_over(unknown).shape("y")

    def fails() -> None:
        raise RuntimeError("shape inference failed")

    with pytest.raises(BackendError, match=r"cannot tell its shapes \(shape inference failed\): its reason"):
        context_over(SimpleNamespace(infer_shapes=fails)).shape("y")


def test_the_older_call_sets_the_memory_where_there_is_one() -> None:
    """The newer dumped core in TensorRT 10.7 without streamed weights."""

    class Both:
        device_memory = 0

        def set_device_memory(self, address: int, nbytes: int) -> None:
            raise AssertionError("the newer call")

    class Newer:
        held = (0, 0)

        def set_device_memory(self, address: int, nbytes: int) -> None:
            self.held = (address, nbytes)

    both, newer = Both(), Newer()
    context_over(both).set_scratch(4096, 512)
    context_over(newer).set_scratch(4096, 512)
    assert both.device_memory == 4096
    assert newer.held == (4096, 512)


def test_a_kernel_cache_that_is_refused_is_not_kept() -> None:
    kinds = SimpleNamespace(EAGER=1, LAZY=2)
    module = SimpleNamespace(
        DynamicShapesKernelSpecializationStrategy=kinds,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=1),
    )
    config = SimpleNamespace(
        create_runtime_cache=lambda: SimpleNamespace(serialize=lambda: b"kernels"),
        set_execution_context_allocation_strategy=lambda _: None,
        set_runtime_cache=lambda _: False,
    )
    engine = SimpleNamespace(
        num_io_tensors=0, create_runtime_config=lambda: config, create_execution_context=lambda _: object()
    )
    runtime: Any = SimpleNamespace(
        module=module, builder="tensorrt-rtx", messages=Messages(), given=lambda made, _: made
    )
    loaded = trt_runtime._TrtEngine(runtime, engine)
    with pytest.warns(RuntimeWarning, match="will not be kept: its reason"):
        loaded.context(fixed=True)
    assert loaded.kernels() == b""
