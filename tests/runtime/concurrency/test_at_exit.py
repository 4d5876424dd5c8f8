"""A script that ends while a reply is made ends with its own status, not by a signal."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")


PATIENCE = 240
WHOLE = """
import sys
from omniport.runtime import OmniSession

session = OmniSession.open(sys.argv[1], backend=sys.argv[2])
events = session.reply([{"role": "user", "content": "Hello."}], speak=True)
for count, event in enumerate(events):
    if count == int(sys.argv[3]):
        raise ValueError("mine")
"""
TURN = """
import sys
from omniport.runtime import OmniSession

session = OmniSession.open(sys.argv[1], backend=sys.argv[2])
turn = session.turn(speak=True)
turn.push_text("Hello.")
events = turn.commit()
for _ in range(int(sys.argv[3])):
    next(events)
sys.exit(7)
"""


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
@pytest.mark.parametrize(("script", "status"), [(WHOLE, 1), (TURN, 7)], ids=["whole", "turn"])
def test_the_scripts_own_status(tiny_bundle: Path, script: str, status: int, backend: str, after: int) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", script, str(tiny_bundle), backend, str(after)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == status, ended.stderr
    assert "terminate" not in ended.stderr
    assert ("ValueError: mine" in ended.stderr) == (status == 1)
