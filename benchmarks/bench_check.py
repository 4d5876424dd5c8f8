"""Measure a bundle again and compare its ratios with the committed ones: `make bench-check`.

    python -m benchmarks.bench_check BUNDLE CHECKPOINT [--stages A,B] [--band 0.25]

Exit code 1: a ratio fell below the committed one by more than the band. Times are not compared, ratios of one run are:
those to transformers, and shares of the roofline where there is no reference. Close other programs first.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omniport.export.evaluation.transformers_rival import TransformersRival
from omniport.runtime.bench.benchmark import bench
from omniport.runtime.bench.results import BAND, changes, read_report
from omniport.runtime.system.host import physical_cores

from benchmarks.harness import RESULTS, command_line


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--stages", default="prefill,decode,talker,dit,bigvgan")
    parser.add_argument("--band", type=float, default=BAND)
    options = parser.parse_args()
    before = read_report(RESULTS / "bench.json")
    threads = 1 if before.clock == "cpu" else physical_cores()
    now = bench(
        options.bundle,
        options.stages.split(","),
        rival=lambda bundle: TransformersRival(bundle, options.checkpoint, threads),
        threads=threads,
        clock=before.clock,
        progress=lambda stage, done, total: print(f"{stage} ({done} of {total})", file=sys.stderr),
    )
    rows = changes(before, now, options.band)
    for row in rows:
        mark = "ok  " if row.ok else "SLOW"
        print(f"{mark} {row.stage} {row.name}: {row.what} {row.now:.2f}, committed {row.before:.2f}")
    if not rows:
        raise SystemExit("nothing to compare: docs/results/bench.json has none of these figures")
    sys.exit(0 if all(row.ok for row in rows) else 1)


if __name__ == "__main__":
    main()
