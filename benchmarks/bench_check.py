"""Measure a bundle again and compare its ratios with the committed ones: `make bench-check`.

    python -m benchmarks.bench_check BUNDLE CHECKPOINT [--stages A,B] [--band 0.25]

Exit code 1: a ratio fell below the committed one by more than the band. Times are not compared, ratios of one run are:
those to transformers, and shares of the roofline where there is no reference. What this machine has no backend for is
left out and named. Close other programs first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omniport.export.evaluation.transformers_rival import TransformersRival
from omniport.runtime.bench.benchmark import bench
from omniport.runtime.bench.results import BAND, BenchReport, Change, changes, read_report
from omniport.runtime.errors import BackendError
from omniport.runtime.system.host import physical_cores

from benchmarks.harness import RESULTS, command_line

#: files of committed figures of the same bundle
COMMITTED = ("bench.json", "bench-bf16.json")


def compare(before: BenchReport, options: argparse.Namespace) -> list[Change]:
    """Measure what a report holds again, on its backend, and compare."""
    threads = 1 if before.clock == "cpu" else physical_cores()
    stages = [name for name in before.stages if not options.stages or name in options.stages.split(",")]
    if not stages:
        return []
    now = bench(
        options.bundle,
        stages,
        rival=lambda bundle: TransformersRival(bundle, options.checkpoint, threads),
        threads=threads,
        clock=before.clock,
        backend=before.backend,
        compute=before.compute or None,
        progress=lambda stage, done, total: print(f"{stage} ({done} of {total})", file=sys.stderr),
    )
    return changes(before, now, options.band)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--stages", default="", help="with commas between; all that are committed without it")
    parser.add_argument("--band", type=float, default=BAND)
    options = parser.parse_args()
    rows = []
    for file in COMMITTED:
        before = read_report(RESULTS / file)
        try:
            found = compare(before, options)
        except BackendError as error:
            print(f"none {file}: {error}")
            continue
        for row in found:
            mark = "ok  " if row.ok else "SLOW"
            how = f" in {before.compute} ({before.backend})" if before.compute else ""
            print(f"{mark} {row.stage} {row.name}{how}: {row.what} {row.now:.2f}, committed {row.before:.2f}")
        rows += found
    if not rows:
        raise SystemExit("nothing to compare: no committed file has any of these figures")
    sys.exit(0 if all(row.ok for row in rows) else 1)


if __name__ == "__main__":
    main()
