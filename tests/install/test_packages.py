"""What pyproject.toml says is installed is what the tree holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support.paths import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own dependency there


def setuptools_table() -> dict[str, Any]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(project["tool"]["setuptools"])


def folder_of(package: str, roots: dict[str, str]) -> Path:
    """Where the package is: under the longest name that has a folder of its own."""
    root = max((name for name in roots if f"{package}.".startswith(f"{name}.")), key=len)
    return REPOSITORY / roots[root] / Path(*package.removeprefix(root).strip(".").split("."))


#: Dockerfiles, units and proxies' configurations: they install omniport, and are not part of it
USED_FROM_HERE = REPOSITORY / "serve" / "hosting"


def test_every_package_is_installed() -> None:
    """A folder that is missing in the list works in an editable install and is lost in a wheel."""
    table = setuptools_table()
    listed = [folder_of(package, table["package-dir"]) for package in table["packages"]]
    held = {path.parent for name in table["package-dir"].values() for path in (REPOSITORY / name).rglob("*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == held


def test_every_file_beside_the_code_is_installed() -> None:
    """py.typed and what else a package reads: each is named in package-data, which setuptools needs to be told."""
    table = setuptools_table()
    roots = table["package-dir"]
    named = {
        path
        for package, globs in table["package-data"].items()
        for glob in globs
        for path in folder_of(package, roots).glob(glob)
    }
    held = {path for name in roots.values() for path in (REPOSITORY / name).rglob("*") if path.is_file()}
    held = {path for path in held if not path.is_relative_to(USED_FROM_HERE)}
    assert named == {path for path in held if path.suffix not in (".py", ".pyc")}
    assert {REPOSITORY / name / "py.typed" for name in ("runtime", "serve", "export", "calib", "cli")} <= named
