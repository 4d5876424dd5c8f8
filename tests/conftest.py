"""Fixtures shared by all tests. Checkpoints are made by the committed generator: no downloads."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.bundles import make_bundle
from support.command_line import Omniport

if TYPE_CHECKING:
    from support.live_turns import Live

# The models here are tiny: a second thread only waits for the first, and fights with other processes for the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Traced graphs, reference results and the fixtures below live for one test run, and its worker processes share them.
_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_SHARED = Path(os.environ["OMNIPORT_CACHE"] if _WORKER else tempfile.mkdtemp(prefix="omniport-tests-"))
os.environ["OMNIPORT_CACHE"] = str(_SHARED)
# What runs a graph is the same on every machine, but in the tests of the choice.
os.environ["OMNIPORT_MEASURE"] = "0"
# Their key holds the code that makes them, so traced graphs may outlive a run where a developer says so.
if (_kept := os.environ.get("OMNIPORT_TEST_GRAPHS")) and not _WORKER:
    Path(_kept).mkdir(parents=True, exist_ok=True)
    (_SHARED / "graphs").symlink_to(_kept)

# Tracing makes millions of objects, most of which stay: looking for garbage after each 700 took a tenth of an export.
gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests come first: else a worker ends with one of them while the other has nothing left to do.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays() -> None:
    """Tests, imports and what a whole run shares are left out of collections.

    There are many of these: one for every part that is exported or validated, and one for every planted failure of a
    driver's call. Looking at all that was there before each file took a tenth of the run.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    if not _WORKER:
        shutil.rmtree(_SHARED, ignore_errors=True)


def _once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that ``make`` fills, made by whichever worker asks first; the others wait for it."""
    folder = _SHARED / "fixtures" / name
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """A ``tiny`` random-weight checkpoint (seed 0). Read only: tests that change files copy it first."""
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    return _once("tiny", lambda out: make_checkpoint(out, size="tiny", seed=0))


@pytest.fixture(scope="session")
def tiny_outlier_checkpoint() -> Path:
    """As ``tiny_checkpoint``, with planted activation channels and key biases."""
    from omniport.export.synthetic.make_checkpoint import make_checkpoint

    return _once("tiny-outliers", lambda out: make_checkpoint(out, size="tiny", seed=0, outliers=True))


@pytest.fixture(scope="session")
def lowered_bundle(tiny_checkpoint: Path) -> Path:
    """``tiny_checkpoint`` in float32 for older parsers: decomposed operators, a KV cache that grows. Read only."""
    from omniport.export.exporter import export_checkpoint

    def make(out: Path) -> None:
        export_checkpoint(tiny_checkpoint, out, max_context=4096, ops="decomposed", kv="concat")

    return _once("tiny-lowered", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """``tiny_checkpoint`` exported in float32. Read only: tests that change files copy it first."""
    from omniport.export.exporter import export_checkpoint

    return _once("tiny-bundle", lambda out: export_checkpoint(tiny_checkpoint, out, max_context=4096))


@pytest.fixture(scope="session")
def tiny_outlier_bundle(tiny_outlier_checkpoint: Path) -> Path:
    """``tiny_outlier_checkpoint`` exported in float32. Read only."""
    from omniport.export.exporter import export_checkpoint

    return _once("tiny-outlier-bundle", lambda out: export_checkpoint(tiny_outlier_checkpoint, out, max_context=4096))


@pytest.fixture(scope="session")
def tiny_half_bundles(tiny_checkpoint: Path) -> dict[str, Path]:
    """``tiny_checkpoint`` in fp16, DiT and vocoder too, and in bf16. Read only: tests that edit copy it."""
    from omniport.export.exporter import export_checkpoint

    def make(precision: str) -> Callable[[Path], object]:
        token2wav = "fp16" if precision == "fp16" else "fp32"
        return lambda out: export_checkpoint(
            tiny_checkpoint, out, precision=precision, token2wav=token2wav, max_context=4096
        )

    return {precision: _once(f"tiny-{precision}", make(precision)) for precision in ("fp16", "bf16")}


@pytest.fixture(scope="session")
def wren_bundle() -> Path:
    """The trained model, exported in float32. Read only."""
    from omniport.export.exporter import export_checkpoint
    from support.spoken_questions import WREN

    if not WREN.exists():
        pytest.skip("Wren's trained checkpoint is not in this tree")
    return _once("wren-bundle", lambda out: export_checkpoint(WREN, out, max_context=2048))


@pytest.fixture
def omniport(capsys: pytest.CaptureFixture[str]) -> Omniport:
    """Run a command in this process; gives (exit code, stdout, stderr)."""
    from omniport.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, captured.err

    return call


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Threads that a test started end with it."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(5)
    assert [thread for thread in left if thread.is_alive()] == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle folder made by hand, with stand-ins for the graph files."""
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def live(root: Path) -> Live:
    """A session over fake graphs."""
    from support.live_turns import Live

    return Live(root)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at a reply's clock is a second later: nobody is so quick that the first sound may wait."""
    from omniport.runtime.pipeline.reply import Reply

    clock = itertools.count(1)
    monkeypatch.setattr(Reply, "_elapsed", lambda self: float(next(clock)))
