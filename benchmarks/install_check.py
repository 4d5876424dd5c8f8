"""Install the two packages of ONNX Runtime in every order into a real virtual environment, and mend it as doctor says.

    python -m benchmarks.install_check             # writes docs/results/install-check.md

Needs a package index and 5 GB of disk, and no GPU: without one, the CUDA provider goes as far as the missing driver.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .harness import ROOT, command_line, record, table

#: a reply of ONNX Runtime, on the CPU: what is whole computes
WHOLE = """
import json
import numpy as np
import onnxruntime
from omniport.runtime.backends.onnxruntime.cuda_provider import PROBE
from omniport.runtime.backends.onnxruntime.packages import installed
session = onnxruntime.InferenceSession(PROBE, providers=["CPUExecutionProvider"])
x, w = np.asarray([[[1, 2, 3]]], np.float32), np.asarray([[[10, 1]]], np.float32)
assert session.run(None, {"x": x, "w": w})[0].tolist() == [[[12, 23]]]
print(json.dumps({"packages": installed(), "cuda": "CUDAExecutionProvider" in onnxruntime.get_available_providers()}))
"""
MEND = re.compile(r"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'omniport\[[\w-]+\]'")
Row = dict[str, Any]


class Environment:
    """A virtual environment with omniport, and nothing of ONNX Runtime yet."""

    def __init__(self, folder: Path) -> None:
        self._bin = folder / "bin"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.shell(f"pip install --quiet '{ROOT}'")

    def shell(self, line: str, fails: bool = False) -> str:
        """What a line prints, as a user would type it with the environment active.

        Raises:
            RuntimeError: it fails, and was not to.
        """
        env = {
            **os.environ,
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self._bin.parent),
        }
        env.pop("PYTHONPATH", None)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, env=env, cwd=self._bin.parent)
        if done.returncode and not fails:
            raise RuntimeError(f"{line}: {done.stderr[-2000:]}")
        return done.stdout

    def whole(self) -> Row:
        """Which packages there are, and whether they bring the CUDA provider. Fails unless the CPU's computes."""
        found: Row = json.loads(self.shell(f'python -W error -c "$(cat <<"END"\n{WHOLE}\nEND\n)"'))
        return found

    def doctor(self) -> Row:
        """What doctor reports; its exit code says no more."""
        facts: Row = json.loads(self.shell("omniport doctor --json", fails=True))
        return facts

    def dry_run(self, extra: str) -> list[str]:
        """Packages that pip would install for an extra."""
        told = self.shell(f"pip install --quiet --dry-run --report - '{ROOT}[{extra}]'")
        return sorted(item["metadata"]["name"] for item in json.loads(told[told.index("{") :])["install"])


def why_not(facts: Row, backend: str) -> str:
    """What doctor says about a backend; empty where it can run."""
    return next(row["why_not"] or "" for row in facts["backends"] if row["name"] == backend)


def mend_in(text: str) -> str:
    """The line that mends, out of a message.

    Raises:
        ValueError: it names none.
    """
    found = MEND.search(text)
    if found is None:
        raise ValueError(f"names no line that mends: {text!r}")
    return found[0]


def _both(env: Environment, first: str, second: str, told: Callable[[Row], str]) -> Row:
    """Install both extras in an order; run the line that doctor prints."""
    env.shell("pip uninstall --quiet -y onnxruntime onnxruntime-gpu", fails=True)
    for extra in (first, second):
        env.shell(f"pip install --quiet '{ROOT}[{extra}]'")
    facts = env.doctor()
    said = told(facts)
    env.shell(mend_in(said))
    after = env.doctor()
    if after["conflicts"]:
        raise RuntimeError(f"mended, and doctor still says {after['conflicts']}")
    return {"said": said, "after": env.whole()}


def _first_conflict(facts: Row) -> str:
    (said,) = facts["conflicts"]
    return str(said)


def _half_removed(env: Environment) -> Row:
    """Both are installed and one is removed, which takes files of the other."""
    env.shell("pip uninstall --quiet -y onnxruntime onnxruntime-gpu", fails=True)
    for extra in ("ort", "ort-gpu"):
        env.shell(f"pip install --quiet '{ROOT}[{extra}]'")
    env.shell("pip uninstall --quiet -y onnxruntime")
    said = why_not(env.doctor(), "ort-cpu")
    env.shell(mend_in(said))
    return {"said": said, "after": env.whole()}


def _beside(env: Environment) -> Row:
    """The GPU's package alone; what other extras would add to it."""
    env.shell("pip uninstall --quiet -y onnxruntime onnxruntime-gpu", fails=True)
    env.shell(f"pip install --quiet '{ROOT}[ort-gpu]'")
    for extra in ("export", "calib", "test"):
        if unwanted := [name for name in env.dry_run(extra) if name.startswith("onnxruntime")]:
            raise RuntimeError(f"the extra {extra} brings {unwanted}")
    return {"said": why_not(env.doctor(), "ort-cuda"), "after": env.whole()}


def _cuda_reason(facts: Row) -> str:
    return why_not(facts, "ort-cuda")


CASES: dict[str, Callable[[Environment], Row]] = {
    "`ort`, then `ort-gpu`; the line under *Conflicts*": lambda env: _both(env, "ort", "ort-gpu", _first_conflict),
    "`ort-gpu`, then `ort`; the line under *Conflicts*": lambda env: _both(env, "ort-gpu", "ort", _first_conflict),
    "`ort-gpu`, then `ort`; the line of `ort-cuda`": lambda env: _both(env, "ort-gpu", "ort", _cuda_reason),
    "both, then `pip uninstall onnxruntime`; the line of `ort-cpu`": _half_removed,
    "`ort-gpu` alone; `export`, `calib` and `test` beside it": _beside,
}


def measure(options: argparse.Namespace, found: Any) -> Iterator[Row]:
    """Run every case, in one environment."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        env = Environment(Path(folder) / "venv")
        for title, case in CASES.items():
            start = time.perf_counter()
            row = {"case": title, **case(env), "seconds": round(time.perf_counter() - start)}
            print(f"{title}: {row['after']['packages']}", file=sys.stderr, flush=True)
            rows.append(row)
    gpu = any("cuInit" not in row["said"] and "driver does not load" not in row["said"] for row in rows[-1:])
    yield {"python": sys.version.split()[0], "gpu": gpu, "cases": rows}


def page(found: Row) -> str:
    """docs/results/install-check.md"""
    rows = []
    for row in found["cases"]:
        packages = ", ".join(f"{name} {version}" for name, version in row["after"]["packages"].items())
        cuda = "yes" if row["after"]["cuda"] else "no"
        rows.append((row["case"], row["said"].replace("|", "\\|"), packages, cuda, row["seconds"]))
    head = ("installed; what was followed", "doctor said", "then installed", "CUDA provider listed", "seconds")
    gpu = "a GPU" if found["gpu"] else "no GPU"
    return "\n".join(
        [
            "# Installing ONNX Runtime in every order",
            "",
            "Made by `make install-check`: each row installs into a real virtual environment, runs the line that",
            "`omniport doctor` prints as it is printed, and then a convolution on the CPU. Made on a machine with",
            f"{gpu}, under Python {found['python']}. Without a GPU, a mend takes the CPU's package unless it is",
            "`ort-cuda` that is asked for, and the CUDA provider itself is *not run*.",
            "",
            *table(head, rows),
            "",
        ]
    )


if __name__ == "__main__":
    line = command_line(__doc__)
    line.add_argument("--work", type=Path, help="folder for the virtual environment, which is removed")
    record("install-check", page, measure, line)
