"""A few of the kills of `make kills`: what commands leave is whole or absent, and the next run works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import REPOSITORY


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed")
def test_kills_leave_what_is_whole(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    sources = ("--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle))
    done = subprocess.run(
        [sys.executable, "-m", "scripts.kills", *sources, "--kills", "3", "--only", "quantize,run"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for command in ("quantize", "run"):
        assert [f"{command}: {sign} after" in done.stdout for sign in ("SIGKILL", "SIGTERM", "SIGINT")] == [True] * 3
