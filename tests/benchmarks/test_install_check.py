"""What `make install-check` reads out of doctor's report; the real installs are its own."""

from __future__ import annotations

import json
from typing import Any

import onnxruntime
import pytest
from omniport.cli.commands import doctor
from omniport.runtime.backends.onnxruntime.providers import PROVIDERS

from benchmarks.harness import RESULTS
from benchmarks.install_check import CASES, mend_in, why_not


def test_every_case_ended_whole() -> None:
    found = json.loads((RESULTS / "install-check.json").read_text())
    assert [row["case"] for row in found["cases"]] == list(CASES)
    for row in found["cases"]:
        assert len(row["after"]["packages"]) == 1
        assert row["after"]["cuda"] is ("onnxruntime-gpu" in row["after"]["packages"])


def test_doctor_s_lines_mend_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages installed, the CPU's last: two places of the report hold a line, and each removes both first."""
    monkeypatch.setattr(doctor, "_version", lambda names: "1.31.1")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS["cpu"]])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    facts: dict[str, Any] = doctor.examine()
    (conflict,) = facts["conflicts"]
    both = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install "
    assert mend_in(conflict).startswith(both)
    assert mend_in(why_not(facts, "ort-cuda")) == both + "'omniport[ort-gpu]'"
    with pytest.raises(ValueError, match="names no line"):
        mend_in("pip uninstall onnxruntime && pip install 'omniport[ort-gpu]'")
