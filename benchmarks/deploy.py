"""Deploy checkpoints and write down what was planned and what was measured; docs/results/deploy.md and deploy.json.

    python -m benchmarks.deploy CHECKPOINT OUT --target NAME [--recipe NAME] [--data FILE]
                                [--validate quick|none]

Runs ``omniport deploy`` in a process of its own. What is finished at OUT is not made again: its figures are taken.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omniport.calib.deployment.deploy_figures import compared
from omniport.calib.deployment.deploy_record import read_record
from omniport.runtime.system.host import cpu_name, physical_cores
from rich.filesize import decimal

from benchmarks.harness import command_line, record, table


def page(results: dict[str, Any]) -> str:
    """docs/results/deploy.md."""
    lines = [
        "# Deployments",
        "",
        "Made by `python -m benchmarks.deploy` from deploy.json: do not edit by hand. Random weights;",
        f"{results['machine']}, no GPU, shared with much other work: seconds are not to be compared,",
        "memory and disk are. Planned figures are those of `omniport plan`; what was not run on the device says so.",
    ]
    for name, found in results["deployments"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"{found['plan']}. {found['data']}.", ""]
        lines += table(("what", "planned", "measured"), found["compared"])
        lines += ["", *table(("stage", "seconds", "memory so far", "disk"), found["stages"])]
        lines += ["", found["validated"]]
    return "\n".join(lines) + "\n"


def measure(options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results with one more deployment."""
    arguments = ["deploy", options.checkpoint, str(options.out), "--target", options.target]
    arguments += ["--validate", options.validate]
    for name in ("recipe", "data"):
        arguments += [f"--{name}", value] if (value := getattr(options, name)) else []
    code = subprocess.run([sys.executable, "-c", _RUN, *arguments], check=False).returncode
    if code not in (0, 1):  # 1: a comparison fails, which the page says
        raise SystemExit(code)
    kept = read_record(options.out)
    plan, checked = kept.plan, kept.validated
    samples = "the built-in set"
    if options.data:
        samples = f"{len(Path(options.data).read_text().splitlines())} sample of its own, not the built-in set"
    row = {
        "plan": f"{plan.recipe}, context {plan.context} ({'; '.join(plan.reasons)})",
        "data": f"Calibrated on {samples}" if plan.quantized else "Not quantized",
        "compared": [list(each) for each in compared(kept)],
        "stages": [
            [name, f"{stage.seconds:.1f}", decimal(stage.peak_memory_bytes), decimal(stage.peak_disk_bytes)]
            for name, stage in kept.stages.items()
        ],
        "validated": "Not validated."
        if checked is None
        else f"{checked.checks} checks against PyTorch: {'all hold' if checked.ok else ', '.join(checked.failed)}.",
    }
    machine = f"{cpu_name()}, {physical_cores()} cores"
    name = f"{plan.model} for {plan.target}" + (f", {options.recipe}" if options.recipe else "")
    deployments = found.get("deployments", {}) | {name: row}
    yield {"machine": machine, "deployments": deployments}


_RUN = "import sys; from omniport.cli.main import run; run(sys.argv[1:])"


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--recipe")
    parser.add_argument("--data")
    parser.add_argument("--validate", default="quick")
    record("deploy", page, measure, parser)
