"""Peak memory of an export: a constant, whatever the number of layers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from omniport.export.synthetic.make_checkpoint import SIZES

from benchmarks import export_memory

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc, which only Linux has")
def test_peak_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """2 and 12 decoder layers of 12.6 MB: exporting ten more may not cost as much as holding three of them.

    The margin is for the traced graph's nodes, of which ten layers have some 300, and for the allocator.
    """
    wide = dataclasses.replace(
        SIZES["tiny"],
        text={**SIZES["tiny"].text, "hidden_size": 512, "intermediate_size": 1536, "mrope_section": [16, 24, 24]},
    )
    found = {}
    for layers in (2, 12):
        size = dataclasses.replace(wide, text={**wide.text, "num_hidden_layers": layers})
        checkpoint = export_memory.make_deep(tmp_path / str(layers), size)
        found[layers] = export_memory.measure(str(checkpoint), graphs="thinker")
    weights = {layers: result["weight_bytes"]["thinker"] for layers, result in found.items()}
    assert weights[12] - weights[2] > 110 * MIB, "the weights must be heavy enough to be seen"
    assert found[12]["above_torch"] - found[2]["above_torch"] < 35 * MIB
    assert 20 * MIB < found[12]["above_torch"] < 500 * MIB
