"""Engines of a tiny bundle, stood in for, on a stand-in for the CUDA driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from omniport.runtime.backends.tensorrt.backend import TrtBackend
from omniport.runtime.bundle.reader import Bundle
from support.fake_device import FakeDriver, FakeRuntime, with_engines
from support.stub_cuda import Stub, compiled


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """``tiny`` with stand-ins for all six engines, whose KV caches hold 1,024 tokens."""
    return with_engines(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def backend(bundle: Bundle, driver: FakeDriver) -> Iterator[TrtBackend]:
    made = TrtBackend(bundle, "tensorrt-rtx", runtime=FakeRuntime(bundle, driver), driver=driver)
    yield made
    made.close()


@pytest.fixture(scope="session")
def stub_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the CUDA driver's library, compiled."""
    return compiled(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(stub_library: Path, tmp_path: Path) -> Stub:
    return Stub(stub_library, tmp_path)
