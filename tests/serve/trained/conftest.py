"""A server over Wren, the trained model, whose answers can be right."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.served import ServedSession
    from support.spoken_questions import Listener

# websockets came into the `test` extra later than others
collect_ignore_glob = [] if find_spec("websockets") else ["test_*.py"]


@pytest.fixture(scope="session")
def listener() -> Listener:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed (pip install omniport[hear])")
    from support.spoken_questions import Listener

    return Listener()


@pytest.fixture(scope="module")
def wren(wren_bundle: Path) -> Iterator[ServedSession]:
    """On loopback, with Wyoming. Its replies are sampled from the same numbers each time."""
    from omniport.runtime import OmniSession
    from support.served import ServedSession

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("secrets.randbits", lambda bits: 1)
        with ServedSession(OmniSession.open(wren_bundle), wyoming=("127.0.0.1", 0), any_model=True) as served:
            yield served.start()
