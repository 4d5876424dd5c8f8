"""What is said of TensorRT's packages in each state of an installation."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omniport.cli.commands import doctor
from omniport.runtime.backends.tensorrt import packages
from omniport.runtime.backends.tensorrt.packages import NVIDIA_INDEX, import_builder, why_not
from omniport.runtime.errors import BackendError
from omniport.runtime.system import host

PIP = f"pip install 'omniport[trt]' {NVIDIA_INDEX}"
NO_LIBRARY = "libnvinfer.so.10: cannot open shared object file: No such file or directory"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No other test sees what was imported here."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name == "tensorrt":
            del sys.modules[name]


def state(folder: Path, monkeypatch: pytest.MonkeyPatch, *parts: str, code: str = "") -> None:
    """A Python with these parts of TensorRT, and no others."""
    for part in parts:
        (folder / part).mkdir()
        (folder / part / "__init__.py").write_text(code if part == "tensorrt" else "")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(host, "is_jetson", lambda: False)
    monkeypatch.setattr(host, "read_gpus", lambda: [host.Gpu("H100", "9.0", 80 << 30, False, 0.0)])


@pytest.mark.parametrize(
    ("parts", "code", "said"),
    [
        ((), "", f"tensorrt is not installed here: {PIP}"),
        (("tensorrt_bindings",), "", f"tensorrt is not installed here but for its Python bindings: {PIP}"),
        (("tensorrt_libs",), "", f"tensorrt is not installed here but for its libraries: {PIP}"),
        (
            ("tensorrt", "tensorrt_bindings"),
            f"raise ImportError({NO_LIBRARY!r})",
            f"tensorrt is installed here without its libraries (ImportError: {NO_LIBRARY}). Install it again: "
            f"pip install --force-reinstall 'omniport[trt]' {NVIDIA_INDEX}",
        ),
        (
            ("tensorrt",),
            "raise OSError('wrong ELF class')",
            "tensorrt is installed here but does not import (OSError: wrong ELF class)",
        ),
        (("tensorrt", "tensorrt_bindings", "tensorrt_libs"), "", ""),
    ],
    ids=["nothing", "bindings", "libraries", "no libraries", "broken", "whole"],
)
def test_states_of_tensorrt(
    parts: tuple[str, ...], code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not TensorRT-RTX is there beside it."""
    state(tmp_path, monkeypatch, *parts, code=code)
    assert why_not("tensorrt").startswith(said)
    assert (why_not("tensorrt") == "") is (said == "")
    facts = doctor.examine()
    assert facts["packages"]["tensorrt"] == ("unknown" if "tensorrt" in parts else None)
    (backend,) = (row for row in facts["backends"] if row["name"] == "tensorrt")
    assert backend["can_run"] is (said == "")
    assert (backend["why_not"] or "").startswith(said)
    (engines,) = (row for row in facts["abilities"] if row["name"] == "run engines (tensorrt)")
    assert engines["ready"] is (said == "")
    assert said == "" or "omniport[trt]' " + NVIDIA_INDEX in engines["install"]


def test_pip_has_none_for_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state(tmp_path, monkeypatch)
    monkeypatch.setattr(host, "is_jetson", lambda: True)
    with pytest.raises(BackendError, match=r"not installed here: sudo apt-get install nvidia-jetpack.*site-packages"):
        import_builder("tensorrt")
    assert re.search(r"not made for Jetson.* omniport build", packages.how_to_install("tensorrt-rtx"))
    monkeypatch.setattr(host, "is_jetson", lambda: False)
    assert packages.how_to_install("tensorrt-rtx") == "pip install 'omniport[rtx]'"


def test_tensorrt_rtx_is_here() -> None:
    assert "tensorrt-rtx" in packages.installed()
    assert why_not("tensorrt-rtx") == ""
