"""Kernels that engines compile while they run, kept from one process to the next. No engine runs here."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
from omniport.runtime.backends.tensorrt import kernel_cache as trt_kernels
from omniport.runtime.backends.tensorrt import runtime_api as trt_runtime
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.backends.tensorrt.kernel_cache import KernelFile
from omniport.runtime.bundle.engines import Engine, list_engines
from omniport.runtime.bundle.reader import Bundle
from support.fake_device import FakeDriver, FakeRuntime, with_engines

KERNELS = b"kernels, as bytes\n with a line break and \0"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_engines(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle", ["bigvgan", "audio_encoder"])


@pytest.fixture
def engine(bundle: Bundle) -> Engine:
    return next(engine for engine in list_engines(bundle).usable if engine.record.graph == "bigvgan")


def file_of(engine: Engine, version: str = "1.7.1", device: str = "RTX 4090") -> KernelFile:
    made = KernelFile.of(engine, version, device)
    assert made is not None
    return made


def run(bundle: Bundle, frames: int = 4, version: str = "1.7.1.116", name: str = "Stand-in 4090") -> FakeRuntime:
    """One process: opens the backend, runs the vocoder once, and closes."""
    driver = FakeDriver()
    driver.name = name
    runtime = FakeRuntime(bundle, driver, compiles=True)
    backend = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver)
    runtime.version = version  # of what reads the kernels
    backend.graph("bigvgan").run({"mel": np.zeros((1, 80, frames), np.float32)})
    backend.graph("audio_encoder")  # loaded and never run: it has nothing to keep
    backend.close()
    return runtime


def test_the_next_process_compiles_nothing(bundle: Bundle, cache: Path) -> None:
    assert len(run(bundle).compiled) == 1
    (kept,) = cache.iterdir()
    assert kept.name.startswith("bigvgan-")
    before = kept.stat()
    assert run(bundle).compiled == []
    assert kept.stat().st_mtime_ns == before.st_mtime_ns  # nothing new: nothing is written
    assert kept.stat().st_ino == before.st_ino
    assert len(run(bundle, frames=6).compiled) == 1  # another shape
    assert kept.stat().st_ino != before.st_ino
    assert run(bundle, frames=6).compiled == run(bundle).compiled == []


def test_what_the_runtime_refuses_is_compiled_and_kept_anew(bundle: Bundle, engine: Engine) -> None:
    """Another driver, for one: our header fits and TensorRT-RTX says no."""
    file = file_of(engine, "1.7.1.116", "Stand-in 4090")
    file.write(b"kernels of another driver")
    runtime = run(bundle)
    assert runtime.refused == [b"kernels of another driver"]
    assert len(runtime.compiled) == 1
    assert file.read().startswith(b"kernels 1.7.1.116")


@pytest.mark.parametrize("change", [{"version": "1.8.0"}, {"name": "Stand-in L4"}])
def test_other_machines_do_not_meet(bundle: Bundle, cache: Path, change: dict[str, str]) -> None:
    run(bundle)
    runtime = run(bundle, **change)
    assert runtime.refused == []  # nothing was offered
    assert len(runtime.compiled) == 1
    assert len(list(cache.iterdir())) == 2


def test_no_file_without_a_cache(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIPORT_CACHE", "")
    run(bundle)
    assert not cache.exists()
    monkeypatch.delenv("OMNIPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run(bundle)
    assert len(list((cache / "omniport" / "kernels").iterdir())) == 1


def test_a_file_is_what_was_written(engine: Engine, cache: Path) -> None:
    file = file_of(engine)
    assert file.read() == b""
    file.write(KERNELS)
    assert file.read() == KERNELS
    assert [path.name for path in cache.iterdir()] == [file.path.name]  # nothing half-written beside it
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    file.write(b"")
    assert file.read() == KERNELS
    paths = {file.path, file_of(engine, "1.7.2").path, file_of(engine, device="L4").path}
    assert len(paths) == 3


def _swap(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-1] + b"x",
        lambda data: b"",
        lambda data: b"\n" + KERNELS,
        lambda data: KERNELS,
        lambda data: b"{" * 10_000 + data,
        lambda data: _swap(data, b'"1.7.1"', b'"1.7.2"'),
        lambda data: _swap(data, b'"8.9"', b'"8.6"'),
        lambda data: _swap(data, b"RTX 4090", b"RTX 4080"),
        lambda data: _swap(data, b'"schema_version":1', b'"schema_version":2'),
        lambda data: _swap(data, b'"omniport-kernels"', b'"omniport-engine"'),
    ],
)
def test_a_file_that_is_not_whole_is_not_taken(engine: Engine, damage: Any) -> None:
    file = file_of(engine)
    file.write(KERNELS)
    file.path.write_bytes(damage(file.path.read_bytes()))
    assert file.read() == b""
    file.write(KERNELS)
    assert file.read() == KERNELS


@pytest.mark.skipif(os.name != "posix", reason="about owners and permissions")
def test_a_file_of_others_is_not_taken(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(engine)
    file.write(KERNELS)
    for mode in (0o620, 0o602):
        file.path.chmod(mode)
        assert file.read() == b""
    file.path.chmod(0o600)
    assert file.read() == KERNELS
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert file.read() == b""
    monkeypatch.undo()
    real = file.path.rename(tmp_path / "elsewhere")
    file.path.symlink_to(real)
    assert file.read() == b""
    file.path.unlink()
    os.mkfifo(file.path)
    assert file.read() == b""


def test_a_file_that_is_too_large_is_neither_read_nor_written(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(engine)
    file.write(KERNELS)
    monkeypatch.setattr(trt_kernels, "MOST_BYTES", file.path.stat().st_size - 1)
    assert file.read() == b""
    monkeypatch.setattr(trt_kernels, "MOST_BYTES", 5000)
    file.write(b"x" * 1000)
    assert file.read() == KERNELS


def test_a_folder_that_cannot_be_written_is_no_failure(engine: Engine, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in the folder's place")
    file_of(engine).write(KERNELS)
    assert file_of(engine).read() == b""


def test_calls_of_tensorrt_rtx() -> None:
    """Names are those of the real module, where it is installed; one cache is shared by an engine's contexts."""
    runtime = trt_runtime.TrtRuntime("tensorrt-rtx")
    native = Mock(num_io_tensors=0)
    config = native.create_runtime_config.return_value
    kept = config.create_runtime_cache.return_value
    kept.deserialize.side_effect = [True, False]
    kept.serialize.return_value = KERNELS
    loaded = trt_runtime._TrtEngine(runtime, native)
    assert loaded.take_kernels(KERNELS)
    assert not loaded.take_kernels(b"other")
    loaded.context(False)
    loaded.context(True)
    assert loaded.kernels() == KERNELS
    assert [made for made in config.mock_calls if "runtime_cache" in made[0] and "serialize()" not in str(made)] == [
        call.create_runtime_cache(),
        call.create_runtime_cache().deserialize(KERNELS),
        call.create_runtime_cache().deserialize(b"other"),
        call.set_runtime_cache(kept),
        call.set_runtime_cache(kept),
    ]
    assert native.create_execution_context.call_args_list == [call(config)] * 2
    for kind, names in {
        "ICudaEngine": ("create_runtime_config",),
        "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache"),
        "IRuntimeCache": ("serialize", "deserialize"),
    }.items():
        assert not [name for name in names if not hasattr(getattr(runtime.module, kind), name)]


def test_an_engine_that_compiles_nothing_keeps_nothing() -> None:
    plain = Mock(spec=["num_io_tensors"], num_io_tensors=0)
    loaded = trt_runtime._TrtEngine(trt_runtime.TrtRuntime("tensorrt-rtx"), plain)
    assert not loaded.take_kernels(KERNELS)
    assert loaded.kernels() == b""
