"""Fixtures shared by all tests. Checkpoints are made by the committed generator: no downloads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# The models here are tiny: a second thread only waits for the first, and fights with other processes for the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: traced graphs are cached for one test run only, so that every run traces with the code under test
_CACHE = tempfile.mkdtemp(prefix="omniport-cache-")
os.environ["OMNIPORT_CACHE"] = _CACHE


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``tiny`` random-weight checkpoint (seed 0). Read only: tests that change files copy it first."""
    from omniport.export.synthetic import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", size="tiny", seed=0)


@pytest.fixture(scope="session")
def tiny_outlier_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_checkpoint``, with planted activation channels and key biases."""
    from omniport.export.synthetic import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-outliers", size="tiny", seed=0, outliers=True)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` exported in float32. Read only: tests that change files copy it first."""
    from omniport.export.exporter import export_checkpoint

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export_checkpoint(tiny_checkpoint, out, max_context=4096)
    return out
