"""What needs an NVIDIA GPU, and benchmarks.gpu_check, which measures one; without a GPU only that module is tried."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.backends.tensorrt.cuda import DeviceBuffer, PinnedBuffer
from omniport.runtime.backends.tensorrt.cuda_driver import CudaDriver
from omniport.runtime.backends.tensorrt.execution import Executor, Scratch
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import gpu_capability
from support.cuda_checks import Cycle, Echo, MirrorDriver, round_trip
from support.fake_device import CAPABILITY, FakeDriver, FakeRuntime, with_engines
from support.live_turns import sort
from support.stub_cuda import Stub, compiled

from benchmarks import gpu_check

needs_gpu = pytest.mark.skipif(
    gpu_capability() is None, reason="no NVIDIA GPU: the CUDA driver is missing or sees none"
)


@dataclass(frozen=True)
class Device:
    """A CUDA driver: the GPU's; or a stand-in for one, over which the tests themselves are tried.

    Attributes:
        library: for `CudaDriver`.
        block: bytes of which there is room for some, and for an end.
        count: how often what might go wrong is repeated.
    """

    library: str | None
    block: int
    count: int


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Device:
    if request.param == "gpu":
        return Device(None, 1 << 32, 100)
    stub = Stub(compiled(tmp_path), tmp_path)
    stub.room(1 << 24)
    return Device(stub.path, 1 << 22, 3)


@pytest.mark.gpu
@needs_gpu
def test_what_the_driver_says_of_the_gpu() -> None:
    driver = CudaDriver()
    assert driver.capability() == gpu_capability()
    assert driver.device_name()


def test_memory_goes_there_and_back_from_threads(device: Device) -> None:
    """Each has a driver of its own, as sessions have."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: round_trip(CudaDriver(device.library), seed, 256, device.count // 2), range(4)))


def test_captures_while_other_threads_allocate(device: Device) -> None:
    driver = CudaDriver(device.library)
    stream, stop = driver.create_stream(), threading.Event()

    def allocate() -> None:
        other = CudaDriver(device.library)
        mine = other.create_stream()
        while not stop.is_set():
            there, back = PinnedBuffer(other, 4096), DeviceBuffer(other, 4096)
            other.to_device(back.address, there.address, 4096, mine)
            other.synchronize(mine)
            back.release()
            there.release()

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(allocate) for _ in range(3)]
        try:
            for k in range(device.count):
                executor = Executor(driver, stream, Echo(driver), {"x": "float32"}, {"y": "float32"}, Scratch(driver))
                values = np.full((1, k + 1), k, np.float32)
                assert (executor.run({"x": values})["y"] == k).all()
                executor.capture()
                for step in range(5):
                    assert (executor.run({"x": values + step})["y"] == k + step).all()
                executor.release()
        finally:
            stop.set()
        for other in others:
            other.result()


def test_the_collector_frees_during_a_capture(device: Device) -> None:
    driver = CudaDriver(device.library)
    stream, there, back = driver.create_stream(), PinnedBuffer(driver, 256), DeviceBuffer(driver, 256)
    there.view((256,), np.dtype(np.uint8))[:] = 5
    gc.disable()
    try:
        Cycle(DeviceBuffer(driver, 1 << 20), PinnedBuffer(driver, 1 << 20))

        def body() -> None:
            gc.collect()
            driver.to_device(back.address, there.address, 256, stream)

        graph = driver.capture(stream, body)
    finally:
        gc.enable()
    driver.launch(graph, stream)
    driver.to_host(there.address, back.address, 256, stream)
    driver.synchronize(stream)
    assert (there.view((256,), np.dtype(np.uint8)) == 5).all()
    driver.destroy_graph(graph)


def test_a_full_gpu_works_again_once_there_is_room(device: Device) -> None:
    driver = CudaDriver(device.library)
    with pytest.raises(BackendError, match="the GPU has no room for"):
        driver.allocate(1 << 46)
    round_trip(driver, 0)
    held: list[DeviceBuffer] = []

    def fill() -> None:
        for _ in range(1000):
            held.append(DeviceBuffer(driver, device.block))

    with pytest.raises(BackendError, match="the GPU has no room for"):
        fill()
    assert held
    for buffer in held:
        buffer.release()
    round_trip(driver, 1)


@pytest.mark.gpu
@needs_gpu
def test_waiting_for_the_gpu_leaves_other_threads_alone() -> None:
    driver = CudaDriver()
    stream, memory, done = driver.create_stream(), DeviceBuffer(driver, 1 << 30), threading.Event()

    def work() -> None:
        for _ in range(2000):
            driver.zero(memory.address, 1 << 30, stream)
        driver.synchronize(stream)
        done.set()

    thread, count, start = threading.Thread(target=work), 0, time.perf_counter()
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        count += 1
    seconds = time.perf_counter() - start
    thread.join()
    assert seconds > 0.2, "the GPU was done at once: nothing was waited for"
    assert count / seconds > 200, f"{count} wake-ups in {seconds:.1f} s: the GIL was held"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["half", "lowered"])
def test_replies_over_memory_that_was_never_zero(
    kind: str, tiny_half_bundles: dict[str, Path], lowered_bundle: Path, tmp_path: Path
) -> None:
    """ONNX Runtime in place of engines, in the driver's memory: what is read and was never written shows."""
    source = tiny_half_bundles["fp16"] if kind == "half" else lowered_bundle
    bundle = with_engines(source, tmp_path / "bundle", ["thinker", "talker", "dit", "bigvgan"])
    driver = MirrorDriver(None, CAPABILITY)
    runtime = FakeRuntime(bundle, driver, capturable=False)
    engines = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    thinker, talker = SamplingConfig(max_new_tokens=8), SamplingConfig(max_new_tokens=16, temperature=0.0)
    replies = []
    for backend in (open_backend("ort-cpu", bundle, threads=1), engines):
        with OmniSession(bundle, backend, max_context=1024) as session:
            messages = [{"role": "user", "content": "What is the sea like at night?"}]
            replies.append([sort(session.reply(messages, thinker=thinker, talker=talker)) for _ in range(2)])
    for (_, wanted_sound, wanted, *_), (_, sound, got, *_) in zip(*replies, strict=True):
        assert len(wanted.codec_ids) > 10
        assert (got.token_ids, got.codec_ids) == (wanted.token_ids, wanted.codec_ids)
        assert float(np.std(wanted_sound)) > 1e-3
        assert np.allclose(sound, wanted_sound, atol=5e-2 * float(np.std(wanted_sound)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:.*run on the CPU:RuntimeWarning")
@pytest.mark.parametrize("backend", gpu_check.BACKENDS)
def test_tiny_on_the_gpu(
    backend: str, tiny_half_bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from omniport.export.devices.detect import this_target

    bundle = with_engines(tiny_half_bundles["fp16"], tmp_path / "bundle", [])
    plan = gpu_check.Plan(prompt=64, steps=16, seconds=0.6)
    row = gpu_check.check_backend(bundle.root, tiny_checkpoint, backend, this_target(), plan)
    if "not_run" in row:
        pytest.skip(f"{backend} cannot run here: {row['not_run']}")
    assert row["parity"]["ok"], row["parity"]
    assert row["decode"]["thinker"]["tokens_per_second"] > 0
    assert row["reply"]["time_to_first_audio"] > 0


# the script itself, on the CPU: nothing here is a figure of a GPU


def test_the_script_without_a_gpu(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    os.symlink(tiny_checkpoint, work / "tiny")
    os.symlink(tiny_bundle, work / "tiny-fp32")
    options = ["--sizes", "tiny", "--precision", "fp32", "--backends", "ort-cpu", "--graphs", "bigvgan"]
    places = ["--steps", "8", "--seconds", "0.3", "--work", str(work), "--out", str(out), "--name", "trial"]
    if gpu_capability() is None:
        with pytest.raises(SystemExit, match="no NVIDIA GPU can be used"):
            gpu_check.main(["--sizes", "tiny", "--work", str(work), "--out", str(out)])
        assert not list(out.iterdir())
    code = gpu_check.main([*options, *places])
    document = json.loads((out / "gpu-trial.json").read_text())
    row = document["results"][0]
    assert row["runs_as"] == "ort-cpu"
    assert row["parity"]["ok"] is (code == 0)
    assert row["parity"]["stages"]["bigvgan"]["pass"] > 0
    decode = row["decode"]["thinker"]
    weights = sum(path.stat().st_size for path in (tiny_bundle / "graphs").glob("thinker*data*"))
    assert weights > 0
    assert decode["bytes_per_token"] > weights
    assert decode["bytes_per_second"] == pytest.approx(
        decode["bytes_per_token"] * decode["tokens_per_second"], rel=0.01
    )
    assert row["reply"]["codec_tokens"] > 10
    assert 0 < row["reply"]["time_to_first_token"] < row["reply"]["time_to_first_audio"]
    assert document["machine"]["packages"]["numpy"] == np.__version__
    assert "parity holds" in capsys.readouterr().out


def test_what_counts_as_failed() -> None:
    good, bad, absent = {"parity": {"ok": True}}, {"parity": {"ok": False}}, {"not_run": "no GPU"}
    assert not gpu_check.failed({"results": [good, absent]})
    assert gpu_check.failed({"results": [good, bad]})
    assert gpu_check.failed({"results": [absent]})
    names = {"NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA H100 80GB HBM3": "h100-80gb-hbm3"}
    for title, name in names.items():
        assert gpu_check.file_name({"machine": {"gpu": {"title": title}}}) == name
    assert gpu_check.file_name({"machine": {"gpu": None}}) == "cpu"


def test_engines_report_how_they_decode(tiny_bundle: Path, tmp_path: Path) -> None:
    """Over the stand-in: the figures are nobody's, their names and sums are what is looked at."""
    from omniport.export.devices.catalog import TARGETS

    bundle, driver = with_engines(tiny_bundle, tmp_path / "b", ["thinker"]), FakeDriver()
    driver.put_cost = 1e-3  # so that a CUDA graph pays beside other work too
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=FakeRuntime(bundle, driver), driver=driver)
    plan, target = gpu_check.Plan(prompt=20, steps=8), TARGETS["rtx-4090"]
    found = gpu_check.decode_rate(bundle, backend, "thinker", target, plan)
    assert found["cuda_graph"]["used"]
    assert found["cuda_graph"]["graph_step_seconds"] < found["cuda_graph"]["plain_step_seconds"]
    geometry = bundle.manifest.thinker
    row = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * 4
    files = bundle.manifest.graphs["thinker"].data
    assert found["bytes_per_token"] == sum(bundle.manifest.files[name].size for name in files) + 24 * row
    assert target.bandwidth is not None
    assert found["share_of_roofline"] == pytest.approx(found["bytes_per_second"] / target.bandwidth, abs=1e-4)
