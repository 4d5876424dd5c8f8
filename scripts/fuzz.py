"""Run the fuzzers of tests/fuzz with fresh seeds for some time, and write how many inputs they tried.

Run from the repository's root: python -m scripts.fuzz --seconds 3600
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PAGE = Path("docs/results/fuzz.md")
#: seeds of every kind that one run of pytest takes
BATCH = 8
HEAD = """# Mutated input, counted

Written by `python -m scripts.fuzz` (`make fuzz`). Every input is drawn from a seed: bundles, checkpoints, media and
messages, lines of data and graphs with bytes or values changed, arguments of every command but `talk`, and calls on a
session in any order from several threads (one input of `turns` is such a sequence). None may give a traceback, take
over 60 s, raise the peak of memory by over 1 GB (`turns` aside), or have altered content of a bundle accepted.

"""


def main() -> int:
    """Exit code 1 if a seed failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--first", type=int, default=1000, help="first seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--patience", type=float, default=120, help="seconds for a seed; more where others work too")
    asked = parser.parse_args()
    # a run that hangs in another library's code is ended too: no signal reaches it there
    hang = (f"--timeout={asked.patience:g}", "--timeout-method=thread")
    start, seed, failed = time.monotonic(), asked.first, 0
    with tempfile.TemporaryDirectory() as log:
        while time.monotonic() - start < asked.seconds:
            environment = {**os.environ, "OMNIPORT_FUZZ_SEEDS": f"{seed}:{BATCH}", "OMNIPORT_FUZZ_LOG": log}
            pytest = [sys.executable, "-m", "pytest", "-q", "-n", str(asked.processes), *hang, "tests/fuzz"]
            failed += subprocess.run(pytest, env=environment).returncode != 0
            seed += BATCH
        counts = count(Path(log))
    seconds = time.monotonic() - start
    PAGE.write_text(HEAD + page(counts, seconds, f"{asked.first} to {seed - 1}", failed))
    return 1 if failed else 0


def count(log: Path) -> dict[str, Counter[str]]:
    """Outcomes by kind."""
    counts: dict[str, Counter[str]] = {}
    for path in sorted(log.iterdir()):
        counts.setdefault(path.name.split(".")[0], Counter()).update(path.read_text().split())
    return counts


def page(counts: dict[str, Counter[str]], seconds: float, seeds: str, failed: int) -> str:
    """The figures."""
    total = sum(sum(outcomes.values()) for outcomes in counts.values())
    verdict = "none was at fault" if not failed else f"**{failed} runs of {BATCH} seeds failed**"
    lines = [f"{total:,} inputs in {seconds / 60:.0f} minutes, seeds {seeds}: {verdict}.", ""]
    lines += ["| kind | inputs | outcome |", "|---|---|---|"]
    for kind, outcomes in sorted(counts.items()):
        what = ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(outcomes.items()))
        lines.append(f"| {kind} | {sum(outcomes.values()):,} | {what} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
