"""Install what this machine runs bundles with, and say why: the ONNX Runtime that its GPU can use, or the CPU's.

    python -m scripts.install_backends             # only where no ONNX Runtime is installed yet
    python -m scripts.install_backends --gpu-check # what the GPU can use, in place of what is there

With --gpu-check the builder of its engines, too: TensorRT-RTX or TensorRT, by compute capability. A builder that cannot
be installed is said, and does not keep the rest from being measured.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniport.export.devices.install import Advice, Machine, advise, this_machine
from omniport.runtime.backends.onnxruntime.packages import DISTRIBUTIONS, installed
from omniport.runtime.backends.tensorrt import packages as tensorrt

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ort": "onnxruntime", "ort-gpu": "onnxruntime-gpu"}


@dataclass(frozen=True)
class Step:
    """A run of pip. ``needed``: nothing can go on without it."""

    pip: tuple[str, ...]
    needed: bool = True


def decide(advice: Advice, there: Collection[str], builders: Collection[str], gpu_check: bool) -> list[Step]:
    """What is left to do.

    Args:
        there: packages installed of those that carry the module onnxruntime.
        builders: builders of engines that are installed.
        gpu_check: what is there gives way to what the GPU can use.
    """
    wanted = {PACKAGES[advice.onnxruntime]}
    steps = []
    if set(there) != wanted and (gpu_check or len(there) != 1):
        if there:
            steps.append(Step(("uninstall", "-y", *DISTRIBUTIONS)))
        constraint = str(ROOT / "tests" / "constraints.txt")
        steps.append(Step(("install", "--constraint", constraint, "-e", f"{ROOT}[{advice.onnxruntime}]")))
    if gpu_check and advice.extra and advice.builder not in builders:
        steps.append(Step(("install", "-e", f"{ROOT}[{advice.extra}]", *advice.options), needed=False))
    return steps


def describe(machine: Machine, advice: Advice) -> str:
    """The decision in a line."""
    if machine.capability is None:
        return advice.how
    gpu = f"a GPU of compute capability {machine.capability} on {machine.processor}"
    return f"{gpu}: {PACKAGES[advice.onnxruntime]}; {advice.builder}: {advice.how}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-check", action="store_true", help="replace what is there, and install the builder")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(arguments)
    machine = this_machine()
    advice = advise(machine)
    print(describe(machine, advice), flush=True)
    for step in decide(advice, installed(), tensorrt.installed(), options.gpu_check):
        print(f"pip {shlex.join(step.pip)}", flush=True)
        if options.dry_run:
            continue
        code = subprocess.run([sys.executable, "-m", "pip", "--quiet", *step.pip]).returncode
        if code and step.needed:
            return code
        if code:
            print(f"{advice.builder} was not installed: what needs it will say that it was not run", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
