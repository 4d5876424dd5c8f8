"""A server over Wren, the trained model, whose answers can be right."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.served import ServedSession

# websockets came into the `test` extra later than others
collect_ignore_glob = [] if find_spec("websockets") else ["test_*.py"]


@pytest.fixture(scope="module")
def wren(wren_bundle: Path) -> Iterator[ServedSession]:
    """On loopback, with Wyoming."""
    from support.served import served_alike

    with served_alike(wren_bundle, wyoming=("127.0.0.1", 0), any_model=True) as served:
        yield served
