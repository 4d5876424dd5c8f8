"""Two hundred turns on a real bundle: each equal to its oracle, memory and threads flat."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import soak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc, which Linux has")
def test_soak(tiny_bundle: Path) -> None:
    figures = soak(tiny_bundle, 200)
    assert figures["compared"] > 100
    assert figures["spoken"] > 20
    assert figures["cancelled"] > 20
    assert figures["dropped_turns"] > 20
    assert figures["memory_growth"] < 0.05, figures
    assert figures["threads_most"] == figures["threads_first"], figures
