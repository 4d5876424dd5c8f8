"""What was measured of the published sizes holds the limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from omniport.runtime.bundle.parts import PARTS

from benchmarks.harness import RESULTS

GIB = 1 << 30


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "real-sizes.json").read_text())
    return found


def test_exports_stay_within_two_gigabytes(results: dict[str, Any]) -> None:
    exports = [found for steps in results.values() if isinstance(steps, dict) for found in steps.items()]
    peaks = [found["peak_bytes"] for name, found in exports if name.startswith("export")]
    assert peaks
    assert max(peaks) <= 2 * GIB


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_limits_of_an_export(results: dict[str, Any], size: str) -> None:
    """In BF16, as the checkpoint is: every graph, in twice the time of the copies beside it, besides tracing."""
    found, copied = results[size]["export bf16"], results[size]["copy bf16"]
    assert found["weight_bytes"].keys() == set(PARTS)
    assert len(found["rounds"]) == len(copied["rounds"]) >= 3
    tracing = sum(seconds for stage, seconds in found["stages"].items() if stage.startswith("tracing"))
    assert 0 < found["synced_seconds"] - tracing <= 2 * copied["synced_seconds"]


def test_a_quantized_model_answered_with_every_stage(results: dict[str, Any]) -> None:
    answered = results["3b"]["run int4"]
    stages = {"audio_encoder", "prefill", "thinker", "talker_prefill", "talker", "dit", "bigvgan"}
    assert all(answered["stats"]["busy"][stage] > 0 for stage in stages)
    assert answered["samples"] == 480 * answered["stats"]["codec_tokens"] > 0
    assert answered["peak_bytes"] <= 24 * GIB
