"""Clean FP16 and BF16 bundles pass with the limits of their precision, and only with those.

The thinker and the audio encoder alone are in test_graph_checks.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from omniport.export.validation.checks import end_to_end as end_to_end_checks
from omniport.export.validation.checks import speech_runs
from omniport.export.validation.tolerances import LIMITS, Limit
from omniport.export.validation.types import FAIL, NOT_RUN, PASS, ValidationReport
from omniport.export.validation.validate import validate

GROUPS = ("vision_encoder", "talker", "dit", "bigvgan", "end_to_end", "speech")
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def run(bundle: Path, checkpoint: Path, groups: tuple[str, ...] = GROUPS) -> ValidationReport:
    return validate(bundle, checkpoint, graphs=groups)[0]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """One conversation, with a picture and sound, and one streamed reply."""
    monkeypatch.setattr(end_to_end_checks, "_QUICK", ("audio and image",))
    monkeypatch.setattr(speech_runs, "QUICK_LENGTHS", (37,))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_clean_half_bundle_passes(precision: str, tiny_half_bundles: dict[str, Path], tiny_checkpoint: Path) -> None:
    report = run(tiny_half_bundles[precision], tiny_checkpoint)
    assert [(c.stage, c.name, c.message) for c in report.checks if c.status == FAIL] == []
    assert report.ok
    assert not [check for check in report.checks if check.status == NOT_RUN and "codec ids" not in check.name]
    assert {check.stage for check in report.checks} >= {*GROUPS, "conditioning", "solver", "thinker", "audio_encoder"}
    emulated = ["audio_encoder", "vision_encoder", "thinker", "talker"] if precision == "bf16" else []
    assert (report.precision, report.emulated) == (precision, emulated)
    table = {limit.value for (_, dtype), limit in LIMITS.items() if dtype == DTYPES[precision]}
    talker = [check for check in report.checks if check.stage == "talker"]
    assert talker
    for check in talker:
        assert check.status == PASS
        assert set(check.limits.values()) <= table
    exact = ("one piece", "without roundings", "weights in")
    errors = [float(check.figures["rel_rms"] or 0) for check in talker if not any(name in check.name for name in exact)]
    assert min(errors) > 1e-4, "this is not half precision"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_half_bundle_does_not_pass_as_float32(
    precision: str, tiny_half_bundles: dict[str, Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of float32 find the rounding in every graph that is rounded."""
    single: dict[tuple[str, str], Limit] = {}
    for (what, dtype), limit in LIMITS.items():
        single[what, dtype] = LIMITS.get((what, "float32"), limit)
    monkeypatch.setattr("omniport.export.validation.tolerances.LIMITS", single)
    report = run(tiny_half_bundles[precision], tiny_checkpoint, ("talker", "bigvgan"))
    failed = {check.stage for check in report.checks if check.status == FAIL}
    assert failed == ({"talker", "bigvgan"} if precision == "fp16" else {"talker"})
