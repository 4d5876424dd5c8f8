"""Whether ONNX Runtime's CUDA provider runs is found by running it, and what to install is said where it does not."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.onnxruntime import cuda_provider, packages
from omniport.runtime.backends.onnxruntime.backend import LOADER, OrtBackend
from omniport.runtime.backends.onnxruntime.cuda_provider import PROBE, cuda_options, why_no_cuda
from omniport.runtime.backends.onnxruntime.packages import MEND_GPU, import_onnxruntime, wanted_extra
from omniport.runtime.backends.onnxruntime.providers import PROVIDERS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.system import host
from support.bundles import make_bundle
from support.onnx_graphs import spec, tensor

CUDA, CPU = PROVIDERS["cuda"], PROVIDERS["cpu"]
GPU = host.Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, False, 1e12)
LOG = b"\x1b[1;31m2026-01-01 10:00:00.1 [E:onnxruntime:Default, x.cc:1 operator()] FAIL : Failed to load library"


class FakeOrt:
    """onnxruntime-gpu as far as it is asked, on a machine where its provider runs unless told otherwise."""

    __version__ = "1.31.1"
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, *, runs_on: str = CUDA, missing: str = "", answer: float = 23.0) -> None:
        self.runs_on, self.missing, self.answer = runs_on, missing, answer
        self.preloaded = False
        self.options: list[dict[str, str]] = []

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        self.preloaded = True
        sys.stdout.write("Failed to load libcublasLt.so.13: no such file\n" if self.missing else "")

    def InferenceSession(self, model: bytes, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        assert self.preloaded, "the libraries have to be there first"
        assert model == PROBE
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        assert not enable_fallback
        assert [name for name, _ in providers] == [CUDA]
        if self.missing:
            os.write(2, LOG + f" with error: {self.missing}\n\x1b[m\n".encode())
            raise RuntimeError("graph nodes are assigned to the default CPU EP")
        node = SimpleNamespace(op_type="Conv", name="c")
        return SimpleNamespace(
            get_providers=lambda: [CUDA, CPU],
            run=lambda names, feeds: [np.asarray([[[12, self.answer]]], np.float32)],
            get_provider_graph_assignment_info=lambda: [
                SimpleNamespace(ep_name=self.runs_on, get_nodes=lambda: [node])
            ],
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA driver knows a GPU, and the processor is one that onnxruntime-gpu is published for."""
    monkeypatch.setattr(host, "read_gpus", lambda: [GPU])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_the_probe_is_a_convolution() -> None:
    model = onnx.load_from_string(PROBE)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, *node.input, *node.output) == ("Conv", "x", "w", "y")
    session = onnxruntime.InferenceSession(PROBE, providers=[CPU])
    feeds = {"x": np.asarray([[[1, 2, 3]]], np.float32), "w": np.asarray([[[10, 1]]], np.float32)}
    assert session.run(None, feeds)[0].tolist() == [[[12, 23]]]


@pytest.mark.usefixtures("gpu")
def test_a_provider_that_computes_is_believed(capfd: pytest.CaptureFixture[str]) -> None:
    assert why_no_cuda(FakeOrt()) == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("gpu")
def test_a_missing_library_is_named_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """stdout belongs to --json, and ONNX Runtime prints there."""
    why = why_no_cuda(FakeOrt(missing="libcublasLt.so.13: cannot open shared object file"))
    assert "cannot use CUDAExecutionProvider here: libcublasLt.so.13: cannot open shared object file." in why
    assert "pip install 'omniport[ort-gpu]'" in why
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("ort", "said"),
    [
        (FakeOrt(runs_on=CPU), "a convolution went to CPUExecutionProvider"),
        (FakeOrt(answer=0.0), r"gave \[\[\[12.0, 0.0\]\]\], not"),
    ],
    ids=["on the CPU", "wrong"],
)
def test_a_provider_that_is_only_listed_is_not_believed(ort: FakeOrt, said: str) -> None:
    assert re.search(said, why_no_cuda(ort))


def test_without_a_gpu_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    ort = FakeOrt()
    assert "the CUDA driver does not load" in why_no_cuda(ort)
    assert not ort.preloaded


def test_a_processor_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "published for aarch64: build engines" in why_no_cuda(onnxruntime)
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert why_no_cuda(onnxruntime).endswith(MEND_GPU)


# what opens it


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(make_bundle(tmp_path / "b"))


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_cpu_and_says_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(cuda_provider, "_try", lambda module: "libcudnn.so.9 is missing")
    with pytest.warns(RuntimeWarning, match="runs on the CPU, although there is a GPU: libcudnn.so.9 is missing"):
        assert open_backend("auto", bundle).name == "ort-cpu"
    with pytest.raises(BackendError, match=r"libcudnn.so.9 is missing; or use backend 'ort-cpu'"):
        open_backend("ort-cuda", bundle)
    monkeypatch.setattr(cuda_provider, "_try", lambda module: "")
    assert open_backend("auto", bundle).name == "ort-cuda"


@pytest.mark.usefixtures("gpu")
def test_doctor_believes_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(cuda_provider, "_try", lambda module: "libcudnn.so.9 is missing")
    found = {"onnxruntime": "1.31.1"}
    assert LOADER.problems("ort-cuda", found, True) == ["libcudnn.so.9 is missing"]
    monkeypatch.setattr(cuda_provider, "_try", lambda module: "")
    assert LOADER.problems("ort-cuda", found, True) == []


# which package


def test_a_gpu_wants_the_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "read_gpus", lambda: [GPU])
    for processor, extra in (("x86_64", "ort-gpu"), ("AMD64", "ort-gpu"), ("aarch64", "ort")):
        monkeypatch.setattr("platform.machine", lambda processor=processor: processor)
        assert wanted_extra() == extra


@pytest.mark.usefixtures("gpu")
def test_a_folder_without_files_is_no_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip uninstall` of one of the two packages leaves of the other."""
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    for name in [name for name in sys.modules if name.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BackendError, match=r"lacks its files.*pip uninstall -y onnxruntime onnxruntime-gpu && pip"):
        import_onnxruntime()
    (problem,) = LOADER.problems("ort-cpu", {"onnxruntime": "1.31.1"}, False)
    assert problem.endswith(packages.mend_line())


# with which options


def graph(dtype: str) -> Any:
    made = spec("dit", [tensor("x", 1, 4)], [tensor("velocity", 1, 4)])
    return msgspec.structs.replace(made, precision=dtype)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    assert cuda_options(graph("float16")) == common
    assert cuda_options(graph("float32")) == {**common, "use_tf32": "0"}
    monkeypatch.setenv("OMNIPORT_TF32", "1")
    assert cuda_options(graph("float32")) == common


def test_options_reach_the_session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    backend = OrtBackend(bundle)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, **more: given.append(more))
    monkeypatch.setattr(backend, "_device", "cuda")
    backend._session(Path("dit.onnx"), graph("float32"))
    assert given == [{"providers": [(CUDA, cuda_options(graph("float32"))), CPU], "enable_fallback": 0}]
