"""Python 3.10, which JetPack 6.2 has: what installs there runs, and what cannot run says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.interpreters import fresh_install, run

GREEDY = """
import sys
from omniport.runtime import Done, OmniSession, SamplingConfig
tokens = SamplingConfig(max_new_tokens=8, temperature=0.0)
codes = SamplingConfig(max_new_tokens=24, temperature=0.0)
with OmniSession.open(sys.argv[1], backend="ort-cpu") as session:
    *_, done = session.reply([{"role": "user", "content": "Hello there"}], thinker=tokens, talker=codes)
assert isinstance(done, Done)
print(done.token_ids, done.codec_ids)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python 3.10 with ``omniport[ort,media]``: $PYTHON310, or the one on the path."""
    found = os.environ.get("PYTHON310") or shutil.which("python3.10")
    if not found or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip("no Python 3.10 on this machine: set PYTHON310 to its path")
    return fresh_install(found, tmp_path_factory.mktemp("py310"))


def test_a_lowered_bundle_answers_as_on_newer_pythons(python: Path, lowered_bundle: Path) -> None:
    here, there = run(sys.executable, "-c", GREEDY, lowered_bundle), run(python, "-c", GREEDY, lowered_bundle)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout != ""


def test_a_native_bundle_is_refused_with_a_way_out(python: Path, tiny_bundle: Path) -> None:
    refused = run(python.with_name("omniport"), "run", tiny_bundle, "--text", "Hello")
    assert refused.returncode == 2
    assert "Python 3.10" in refused.stderr
    assert "--ops decomposed --kv concat" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_doctor_says_what_3_10_cannot_do(python: Path) -> None:
    told = run(python.with_name("omniport"), "doctor", "--json")
    assert '"run native graphs in ONNX Runtime"' in told.stdout
    assert "--ops decomposed --kv concat" in told.stdout
