"""The runtime in an environment of its own: base install plus ``ort`` and ``media``, nothing of the export side."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.interpreters import fresh_install, run

from scripts.sample_media import make_media

REPLY = """
import importlib.metadata, sys
installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
assert not installed & {"torch", "transformers", "onnx", "optimum", "safetensors"}, installed
import numpy as np
from omniport.runtime import AudioChunk, Done, OmniSession, SamplingConfig, TextDelta
tone = (np.sin(np.arange(16000) / 20) * 0.1).astype(np.float32)
picture = np.zeros((56, 84, 3), np.uint8)
picture[10:40] = (200, 80, 20)
parts = [
    {"type": "audio", "audio": (tone, 16000)},
    {"type": "image", "image": picture},
    {"type": "video", "video": sys.argv[2]},
    {"type": "text", "text": "What is this?"},
]
with OmniSession.open(sys.argv[1]) as session:
    events = list(session.reply([{"role": "user", "content": parts}], thinker=SamplingConfig(max_new_tokens=6),
                                talker=SamplingConfig(max_new_tokens=14)))
assert isinstance(events[-1], Done), events[-1]
samples = sum(len(e.samples) for e in events if isinstance(e, AudioChunk))
assert samples == len(events[-1].codec_ids) * 480 > 0, samples
assert any(isinstance(e, TextDelta) for e in events)
print("spoke", samples)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment with ``omniport[ort,media]``."""
    return fresh_install(sys.executable, tmp_path_factory.mktemp("bare") / "venv")


@pytest.mark.slow
def test_a_bundle_replies_without_torch(python: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    clip = make_media(tmp_path / "media")["video"]
    result = run(python, "-W", "error", "-c", REPLY, tiny_bundle, clip)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("spoke ")


@pytest.mark.slow
def test_commands_that_need_more_say_what_to_install(python: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    omniport = python.parent / "omniport"
    doctor = run(omniport, "doctor")
    assert doctor.returncode == 0, doctor.stderr
    export = run(omniport, "export", tmp_path, tmp_path / "out")
    assert export.returncode == 2
    assert "omniport[export]" in export.stderr
    assert "Traceback" not in export.stderr
