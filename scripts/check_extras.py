"""Resolve every extra for every supported Python on Linux (x86-64, aarch64) and Windows, from wheels alone.

    python -m scripts.check_extras

By uv and not by `pip install --dry-run --platform`: pip evaluates environment markers (`python_version`) for the
interpreter that it runs in, uv for the one that is asked about.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
#: machine -> uv's name of its platform
MACHINES = {
    "x86_64": "x86_64-manylinux_2_28",
    "aarch64": "aarch64-manylinux_2_28",
    "win_amd64": "x86_64-pc-windows-msvc",
}
#: resolved together -> what they have to bring, and what they must not
GROUPS: dict[tuple[str, ...], tuple[str, str]] = {
    ("media", "live", "export", "calib"): ("torch", "onnxruntime"),
    ("serve",): ("starlette", "pydantic"),
    ("wyoming",): ("wyoming", "pydantic"),
    ("otel",): ("opentelemetry-sdk", "pydantic"),
    ("ray",): ("ray", ""),
    ("ort",): ("onnxruntime", "onnxruntime-gpu"),
    ("ort-gpu",): ("nvidia-cudnn", ""),
    ("openvino",): ("openvino", "onnxruntime"),
}
#: extras that a machine cannot have, with the reason
ABSENT = {
    ("ort-gpu", "aarch64"): "onnxruntime-gpu has no wheels for Linux on aarch64: JetPack's way is TensorRT",
    ("openvino", "aarch64"): "openvino's wheels for aarch64 need glibc 2.35, and this platform has 2.28",
}
#: what uv says without a network, which tells nothing about extras
UNREACHABLE = ("error sending request", "Failed to fetch", "timed out")
#: published as source stubs which fetch libraries of a platform from elsewhere, or part of JetPack
STUBS = {"trt": "tensorrt", "rtx": "tensorrt-rtx"}

#: pip builds it where there is no wheel
SOURCE = {"hear": "pocketsphinx has wheels for some machines and Pythons only, none for 3.14"}


def resolve(extras: Sequence[str], python: str, machine: str) -> tuple[list[str], str]:
    """Packages that extras bring, from wheels; uv's explanation where there are none."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--only-binary", ":all:", "--python-version", python, "--python-platform", MACHINES[machine]]
    done = subprocess.run(
        [*command, *(f"--extra={extra}" for extra in extras), str(PYPROJECT)], capture_output=True, text=True
    )
    names = [line.partition("==")[0] for line in done.stdout.splitlines()]
    return names, "" if done.returncode == 0 else done.stderr.strip()


def judge(names: Sequence[str], wanted: str, unwanted: str, base: Container[str] = ()) -> str:
    """What is wrong with the packages that extras bring; empty if nothing is.

    Args:
        base: packages that an install without extras brings. No extra answers for them: typer brings pydantic by now.
    """
    if not any(name.startswith(wanted) for name in names):
        return f"does not bring {wanted}"
    return f"brings {unwanted}" if unwanted in names and unwanted not in base else ""


def main() -> int:
    """Print a line for each Python, machine and group of extras; 1 if something does not resolve that should."""
    failed = 0
    asked = [
        (extras, python, machine)
        for machine in MACHINES
        for extras in GROUPS
        for python in PYTHONS
        if (extras[0], machine) not in ABSENT
    ]
    installs = [((), python, machine) for machine in MACHINES for python in PYTHONS]
    with ThreadPoolExecutor(8) as pool:  # most of the time is the index's
        base = dict(zip(installs, pool.map(lambda one: resolve(*one)[0], installs), strict=True))
        found = pool.map(lambda one: resolve(*one), asked)
        for (extras, python, machine), (names, problem) in zip(asked, found, strict=True):
            if problem and any(text in problem for text in UNREACHABLE):
                print(f"not checked: the package index cannot be reached: {problem}")
                return 0
            problem = problem or judge(names, *GROUPS[extras], base[(), python, machine])
            failed += bool(problem)
            print(f"{python} {machine}: {', '.join(extras)}: {problem or 'resolves'}", flush=True)
    for (extra, machine), reason in ABSENT.items():
        stale = not resolve([extra], PYTHONS[-1], machine)[1]
        failed += stale
        print(f"{extra} on {machine}: {'resolves now: update ABSENT' if stale else reason}")
    for extra, package in STUBS.items():
        print(f"{extra}: not checked, {package} has no wheels on the index")
    for extra, reason in SOURCE.items():
        print(f"{extra}: not checked, {reason}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
