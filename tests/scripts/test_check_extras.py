"""What `make extras` says of resolved packages; the index itself is asked by `make extras` alone."""

from __future__ import annotations

import tomllib
from support.paths import REPOSITORY

from scripts.check_extras import ABSENT, GROUPS, SOURCE, STUBS, judge


def test_every_extra_is_resolved_or_has_a_reason() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    developers = {"test", "wren"}
    assert {name for group in GROUPS for name in group} | set(STUBS) | set(SOURCE) == set(extras) - developers
    assert {extra for extra, _ in ABSENT} <= set(extras)


def test_a_package_of_the_cpu_beside_the_gpu_s_is_a_failure() -> None:
    wanted, unwanted = GROUPS[("media", "live", "export", "calib")]
    assert judge(["torch", "onnx"], wanted, unwanted) == ""
    assert judge(["torch", "onnxruntime"], wanted, unwanted) == "brings onnxruntime"
    assert judge(["onnxruntime-gpu"], *GROUPS[("ort-gpu",)]) == "does not bring nvidia-cudnn"
    assert judge(["onnxruntime-gpu", "nvidia-cudnn-cu13"], *GROUPS[("ort-gpu",)]) == ""


def test_a_package_that_every_install_brings_is_no_extra_s_fault() -> None:
    names = ["starlette", "typer", "pydantic"]
    assert judge(names, *GROUPS[("serve",)]) == "brings pydantic"
    assert judge(names, *GROUPS[("serve",)], base=["typer", "pydantic"]) == ""
    assert judge(names, *GROUPS[("serve",)], base=["typer"]) == "brings pydantic"
