"""A server for each module of tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from support.bundles import make_bundle

if TYPE_CHECKING:
    from support.served import Served
    from support.spoken_questions import Listener


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """On loopback, without keys."""
    from support.served import Served

    with Served(make_bundle(tmp_path_factory.mktemp("served") / "bundle")) as made:
        yield made.start()


@pytest.fixture(scope="session")
def listener() -> Listener:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed (pip install omniport[hear])")
    from support.spoken_questions import Listener

    return Listener()


@pytest.fixture
def stopped() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()
