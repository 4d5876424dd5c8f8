"""A replica over fake graphs, which says in which process it is."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from omniport.runtime import OmniSession

from .bundles import make_bundle
from .live_turns import Live

#: seconds of a token: a reply takes long enough to be interrupted
_TOKEN = 0.1


def said(process: int) -> str:
    """By a replica of that process: seven tokens, whatever its number."""
    return f"{process:07d}"


def open_session() -> OmniSession:
    """What it answers is the id of its process."""
    live = Live(make_bundle(Path(tempfile.mkdtemp()) / "bundle"))
    live.script(said(os.getpid()), codes=[])
    thinker = live.decoder("thinker")
    compute = thinker.compute

    def slowly(*arguments: Any) -> Any:
        time.sleep(_TOKEN)
        return compute(*arguments)

    thinker.compute = slowly  # type: ignore[method-assign]
    return live.session
