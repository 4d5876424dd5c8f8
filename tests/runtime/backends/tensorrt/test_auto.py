"""``auto``: engines that this machine can run; else ONNX Runtime, with the reason. GPU and engines are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from omniport.export.validation.validate import validate
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.composite import CompositeBackend
from omniport.runtime.backends.tensorrt import backend as trt
from omniport.runtime.backends.tensorrt import packages
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import gpu_capability
from support.command_line import Omniport
from support.fake_device import CAPABILITY, VERSION, FakeDriver, FakeRuntime, with_engines
from support.live_turns import sort

no_gpu = pytest.mark.skipif(gpu_capability() is not None, reason="says what happens without a GPU, and here is one")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A machine whose GPU and engines are stand-ins; ONNX Runtime has no CUDA provider for its processor."""
    driver = FakeDriver()
    monkeypatch.setattr("omniport.runtime.system.host.gpu_capability", lambda: CAPABILITY)
    monkeypatch.setattr("omniport.runtime.backends.onnxruntime.packages.gpu_published", lambda: False)
    monkeypatch.setattr(trt, "CudaDriver", lambda: driver)
    return driver


def installed(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, driver: FakeDriver, version: str = VERSION) -> None:
    monkeypatch.setattr(trt, "TrtRuntime", lambda builder: FakeRuntime(bundle, driver, version))
    monkeypatch.setattr(packages, "installed_version", lambda builder: version)


def says(session: OmniSession) -> tuple[str, str]:
    messages = [{"role": "user", "content": "Hello"}]
    done = sort(session.reply(messages, thinker=SamplingConfig(max_new_tokens=4), speak=False))[2]
    return done.stats.backend, done.text


def test_auto(tiny_bundle: Path, tmp_path: Path, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = OmniSession.open(tiny_bundle, "ort-cpu", threads=1)
    wanted = says(plain)[1]
    assert wanted
    assert open_backend("auto", plain.bundle).name == "ort-cpu"  # a GPU, and no engines
    bundle = with_engines(tiny_bundle, tmp_path / "b", ["thinker", "talker"])
    installed(monkeypatch, bundle, gpu)
    some = OmniSession.open(bundle.root, threads=1)
    assert isinstance(some.backend, CompositeBackend)
    assert says(some) == ("tensorrt-rtx (thinker, talker) + ort-cpu", wanted)
    assert some.max_context == 1024
    some.close()
    with_engines(tiny_bundle, bundle.root, ["audio_encoder", "vision_encoder", "dit", "bigvgan"])
    every = OmniSession.open(bundle.root)
    assert says(every) == ("tensorrt-rtx", wanted)
    every.close()


# why not: said once, with what mends it


def fallback(bundle: Bundle) -> str:
    """The warning with which ``auto`` opens ONNX Runtime."""
    with pytest.warns(RuntimeWarning) as caught:
        assert open_backend("auto", bundle, threads=1).name == "ort-cpu"
    (warning,) = caught
    return str(warning.message)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """With engines that this machine can run."""
    made = with_engines(tiny_bundle, tmp_path / "b", ["thinker", "talker"])
    installed(monkeypatch, made, gpu)
    return made


def test_engines_of_another_version(bundle: Bundle, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, bundle, gpu, version="1.8.0")
    said = fallback(bundle)
    assert said.startswith(f"ONNX Runtime runs thinker of {bundle.root} in place of its engine: tensorrt-rtx 1.7.1.116")
    assert "1.8.0 is installed" in said
    assert said.endswith(f"omniport build {bundle.root} --target this --builder tensorrt-rtx (so for talker)")


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        (
            "system.host.gpu_capability",
            lambda: "8.6",
            "compute capability 8.9, and this machine's GPU has 8.6. Build it here: omniport build",
        ),
        (
            "backends.tensorrt.packages.installed",
            list,
            "tensorrt-rtx is not installed here but for its Python bindings and libraries: pip install 'omniport[rtx]'",
        ),
        (
            "backends.tensorrt.backend.CudaDriver",
            Mock(side_effect=BackendError("the NVIDIA driver is too old")),
            "the NVIDIA driver is too old",
        ),
    ],
    ids=["another GPU", "no TensorRT", "an old driver"],
)
def test_machines_that_cannot(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, found: Callable[[], object], said: str
) -> None:
    monkeypatch.setattr(f"omniport.runtime.{name}", found)
    assert said in fallback(bundle)


def test_a_damaged_engine(bundle: Bundle) -> None:
    """The talker's engine runs, the thinker's does not: mixed, and said."""
    (engine,) = bundle.root.glob("engines/*/thinker.engine")
    engine.write_bytes(b"cut")
    with pytest.warns(RuntimeWarning, match=r"runs thinker of .*thinker\.engine .* bytes"):
        assert open_backend("auto", bundle, threads=1).name == "tensorrt-rtx (talker) + ort-cpu"


def test_engines_for_other_machines_beside_ours_are_no_matter(
    bundle: Bundle, tiny_bundle: Path, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle may hold engines for a whole fleet."""
    other = with_engines(tiny_bundle, bundle.root, ["thinker"], builder="tensorrt", capability="8.7", version="10.3.0")
    installed(monkeypatch, other, gpu)
    assert open_backend("auto", other, threads=1).name == "tensorrt-rtx (thinker, talker) + ort-cpu"


def test_inspect_says_which_run_here(bundle: Bundle, omniport: Omniport, monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect(*options: str) -> tuple[str, str]:
        code, out, err = omniport("inspect", bundle.root, *options)
        assert code == 0
        return out, err

    assert json.loads(inspect("--json")[0])["not_here"] == {}
    monkeypatch.setattr(packages, "installed_version", lambda builder: "1.8.0")
    reasons = json.loads(inspect("--json")[0])["not_here"]
    assert len(reasons) == 2
    assert all("1.8.0 is installed. Build it again: omniport build" in reason for reason in reasons.values())
    shown, said = inspect()
    assert "runs here" in " ".join(shown.split())
    assert " ".join(said.split()).count("not run here (2): tensorrt-rtx 1.7.1.116 built it") == 1


# validation


def test_validate_drives_decoders_in_every_way(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, single steps, caches cut back and written again: the host code holds. The engine is a stand-in."""
    bundle = with_engines(tiny_bundle, tmp_path / "b", ["talker"])
    installed(monkeypatch, bundle, gpu)
    gpu.put_cost = 1e-5
    report, _ = validate(bundle.root, tiny_checkpoint, backend="tensorrt-rtx", graphs=("talker",))
    assert report.ok, [check for check in report.checks if check.status != "pass"]
    assert len(report.checks) > 10
    assert "launch" in gpu.done
    report, _ = validate(bundle.root, tiny_checkpoint, backend="tensorrt-rtx", graphs=("bigvgan",))
    assert {check.status for check in report.checks} == {"not_run"}
    assert "no engine of bigvgan" in report.checks[0].message


def test_validate_auto_takes_engines_of_a_bfloat16_bundle(
    tiny_half_bundles: dict[str, Path],
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    gpu: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph with an engine runs in it, the other as an emulation; and both parts get the same backend."""
    bundle = with_engines(tiny_half_bundles["bf16"], tmp_path / "b", ["audio_encoder"])
    installed(monkeypatch, bundle, gpu)
    monkeypatch.setattr(FakeRuntime, "models", Bundle.open(tiny_bundle))  # no CPU runs the graph itself
    report, _ = validate(bundle.root, tiny_checkpoint, backend="auto", graphs=("audio_encoder", "vision_encoder"))
    assert report.backend == "tensorrt-rtx (audio_encoder) + ort-cpu"
    assert report.emulated == ["vision_encoder", "thinker", "talker"]  # all others in BF16
    assert {check.status for check in report.checks} == {"pass"}
    assert {check.stage for check in report.checks} >= {"audio_encoder", "vision_encoder"}
    assert gpu.done.count("engine") > 2


@no_gpu
def test_auto_without_a_gpu_does_not_look_at_engines(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_engines(tiny_bundle, tmp_path / "b", ["thinker"])
    assert open_backend("auto", bundle, threads=1).name == "ort-cpu"
