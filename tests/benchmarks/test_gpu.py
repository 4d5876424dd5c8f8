"""What needs an NVIDIA GPU, and benchmarks.gpu_check, which measures one; without a GPU only that module is tried."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.backends.tensorrt.cuda import DeviceBuffer, PinnedBuffer
from omniport.runtime.backends.tensorrt.cuda_driver import CudaDriver
from omniport.runtime.system.host import gpu_capability
from support.fake_device import FakeDriver, FakeRuntime, with_engines

from benchmarks import gpu_check

needs_gpu = pytest.mark.skipif(
    gpu_capability() is None, reason="no NVIDIA GPU: the CUDA driver is missing or sees none"
)


@pytest.mark.gpu
@needs_gpu
def test_memory_goes_there_and_back() -> None:
    driver = CudaDriver()
    stream = driver.create_stream()
    there, back, device = PinnedBuffer(driver, 4096), PinnedBuffer(driver, 4096), DeviceBuffer(driver, 4096)
    kind = np.dtype(np.float32)
    there.view((1024,), kind)[:] = np.arange(1024)

    def body() -> None:
        driver.to_device(device.address, there.address, 4096, stream)
        driver.to_host(back.address, device.address, 4096, stream)

    body()
    driver.synchronize(stream)
    assert np.array_equal(back.view((1024,), kind), np.arange(1024))
    graph = driver.capture(stream, body)
    there.view((1024,), kind)[:] = 7
    driver.launch(graph, stream)
    driver.synchronize(stream)
    assert (back.view((1024,), kind) == 7).all()
    driver.destroy_graph(graph)
    driver.destroy_stream(stream)
    assert driver.capability() == gpu_capability()


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
    driver.put_cost = 1e-4
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
