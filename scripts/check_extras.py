"""Resolve every extra for every supported Python on x86-64 and aarch64, from wheels alone.

    python scripts/check_extras.py

By uv and not by `pip install --dry-run --platform`: pip evaluates environment markers (`python_version`) for the
interpreter that it runs in, uv for the one that is asked about.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
EXTRAS = ("ort", "ort-gpu", "media", "live", "export", "calib")
#: extras that a machine cannot have, with the reason
ABSENT = {("ort-gpu", "aarch64"): "onnxruntime-gpu has no wheels for Linux on aarch64: JetPack's way is TensorRT"}
#: what uv says without a network, which tells nothing about extras
UNREACHABLE = ("error sending request", "Failed to fetch", "timed out")
#: published as source stubs which fetch libraries of a platform from elsewhere, or part of JetPack
STUBS = {"trt": "tensorrt", "rtx": "tensorrt-rtx"}


def resolve(extras: list[str], python: str, machine: str) -> str | None:
    """None if wheels for all requirements exist, else uv's explanation."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--only-binary", ":all:"]
    command += ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_28"]
    done = subprocess.run(
        [*command, *(f"--extra={extra}" for extra in extras), str(PYPROJECT)], capture_output=True, text=True
    )
    return None if done.returncode == 0 else done.stderr.strip()


def main() -> int:
    """Print a line for each Python and machine; 1 if something does not resolve that should."""
    failed = 0
    for machine in MACHINES:
        extras = [extra for extra in EXTRAS if (extra, machine) not in ABSENT]
        for python in PYTHONS:
            problem = resolve(extras, python, machine)
            if problem and any(text in problem for text in UNREACHABLE):
                print(f"not checked: the package index cannot be reached: {problem}")
                return 0
            failed += problem is not None
            print(f"{python} {machine}: {', '.join(extras)}: {problem or 'resolves'}", flush=True)
    for (extra, machine), reason in ABSENT.items():
        stale = resolve([extra], PYTHONS[-1], machine) is None
        failed += stale
        print(f"{extra} on {machine}: {'resolves now: update ABSENT' if stale else reason}")
    for extra, package in STUBS.items():
        print(f"{extra}: not checked, {package} has no wheels on the index")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
