"""Code in a Python process of its own: this interpreter's, or one with omniport freshly installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .paths import REPOSITORY


def run(python: str | Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program outside of this checkout and its environment."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([python, *args], capture_output=True, text=True, env=env, cwd="/")


def in_fresh_python(code: str, *args: str | Path, stdin: str = "") -> str:
    """What code prints that ends well."""
    done = subprocess.run([sys.executable, "-c", code, *args], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fresh_install(python: str | Path, folder: Path) -> Path:
    """The interpreter of a new virtual environment with ``omniport[ort,media]``; skips where no index is in reach."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    made = folder / "bin" / "python"
    done = run(made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{REPOSITORY}[ort,media]")
    if done.returncode and "connection" in done.stderr.lower():
        pytest.skip(f"no package index can be reached: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return made
