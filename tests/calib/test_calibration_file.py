"""Calibration files that cannot be read: every one is a refusal that names the file, and none waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omniport.calib.calibration_file import Calibration
from omniport.runtime.errors import BundleError


@pytest.mark.parametrize("content", [b"", b"x" * 100, (2**40).to_bytes(8, "little") + b"{}", b"\xff" * 16])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.calib"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot read the calibration .*a\.calib: .* Run omniport calibrate again"):
        Calibration.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "a.calib"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # so that a library that opens it does not wait here
    try:
        for path in (pipe, Path("/dev/zero"), tmp_path):
            with pytest.raises(BundleError, match="it is not a regular file"):
                Calibration.load(path)
    finally:
        os.close(held)
