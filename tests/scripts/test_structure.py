"""scripts/structure.py counts what it says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts import structure

FILES = {
    "runtime/__init__.py": "",
    "runtime/a.py": 'from .b import f\nPART = "dit"\n',
    "runtime/b.py": "def f(x, *, y=1): ...\ndef _g(a, b, c, d, e): ...\n",
    "export/a.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from omniport.export.c import C\n"
        "class D:\n    def m(self, a, b, c):\n        def inner(*rest): ...\n" + "        a\n" * 61
    ),
    "export/c.py": "class C:\n    def m(self):\n        from .a import D\n        from omniport.runtime import a\n",
    "cli/main.py": "def command(a, b, c, d, e, f): ...\n",
    "benchmarks/x.py": "1\n",
    "tests/test_x.py": "1\n2\n",
    "README.md": "three words here",
    "docs/sub/page.md": "one",
}


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Any]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return structure.count(tmp_path)


def test_what_is_counted(figures: dict[str, Any]) -> None:
    assert figures == {
        "product: files": 6,
        "product: lines": sum(text.count("\n") for name, text in FILES.items() if name[:3] in ("run", "exp", "cli")),
        "scripts and benchmarks: files": 1,
        "scripts and benchmarks: lines": 1,
        "tests: files": 1,
        "tests: lines": 2,
        "lines of the longest product file": 67,
        "most modules in one folder": "3 (runtime)",
        "module names used more than once": 1,
        "files that share such a name": 2,
        "longest chain of imports": 3,  # the circle of export, runtime.a, runtime.b
        "circles of imports": 1,
        **{f"files with the literal {part}": int(part == "dit") for part in structure.PARTS},
        "parameters, 90th percentile": 6,
        "most parameters outside cli": "3 (export/a.py:D.m)",
        "most positional parameters outside cli, public": "3 (export/a.py:D.m)",
        "lines of the longest function": "63 (export/a.py:D.m)",
        "functions over 60 lines": 1,
        "words of README.md": 3,
        "words of docs": 1,
    }


def test_a_revision_is_counted_as_it_was(
    figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "runtime" / "c.py").write_text("later\n")
    assert structure.at_revision("HEAD") == figures
    assert structure.count(tmp_path)["product: files"] == figures["product: files"] + 1
