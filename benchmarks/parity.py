"""Write docs/results/parity.md: each graph, and streamed against whole replies, measured on the tiny checkpoint.

    python -m benchmarks.parity

Runs the standard comparisons of `omniport.export.evaluation.cases` on a fresh export, and the end-to-end tests,
whose streamed
figures come from their JUnit report.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from omniport.export.evaluation.cases import ParityRow, check_bundle
from omniport.export.exporter import export_checkpoint
from omniport.export.synthetic.make_checkpoint import make_checkpoint

from benchmarks.harness import RESULTS, ROOT

OUT = RESULTS / "parity.md"


def graph_rows(folder: Path) -> list[ParityRow]:
    """The standard comparisons of every graph."""
    checkpoint = make_checkpoint(folder / "tiny", size="tiny", seed=0)
    export_checkpoint(checkpoint, folder / "bundle", max_context=4096)
    return check_bundle(folder / "bundle", checkpoint)


def reply_figures(folder: Path) -> tuple[str, dict[str, str]]:
    """The end-to-end tests' own count, and the figures they record. Exits if one of them fails."""
    report = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests/export/test_end_to_end.py", f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    root = ElementTree.parse(report).getroot()
    suite = next(root.iter("testsuite"))
    figures = {str(p.get("name")): str(p.get("value")) for p in suite.iter("property")}
    return f"{suite.get('tests')} tests, {suite.get('failures')} failed, {suite.get('skipped')} skipped", figures


def page(rows: list[ParityRow], count: str, figures: dict[str, str]) -> str:
    """The page's text."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnx", "onnxruntime"))
    lines = [
        "# Parity with transformers",
        "",
        "Written by `python -m benchmarks.parity`: checkpoint `tiny` (random weights, seed 0), FP32, ONNX",
        f"Runtime's CPU provider, {platform.machine()}, {packages}.",
        "",
        "| graph | case | relative RMS error | largest difference | RMS of the reference | limit |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.graph} | {r.case} | {r.rel_rms:.1e} | {r.max_abs:.1e} | {r.energy:.3f} | {r.tolerance:.0e} |"
        for r in rows
    ]
    lines += [
        "",
        f"Whole replies (`tests/export/test_end_to_end.py`: {count}): prompt ids, positions, text ids",
        "and codec ids equal, the waveform within 1e-3 relative RMS of the reference with the same noise. Streamed",
        "windows against the whole utterance:",
        "",
        "| figure (relative RMS error, or correlation) | value |",
        "|---|---|",
    ]
    lines += [f"| {name} | {float(value):.7g} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = graph_rows(Path(folder))
        bad = [row for row in rows if not row.ok]
        if bad:
            sys.exit(f"out of tolerance: {bad}")
        text = page(rows, *reply_figures(Path(folder)))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
