"""Peak memory of an export: a constant, whatever the number of layers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from omniport.export.synthetic.make_checkpoint import SIZES

from benchmarks import export_memory

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc, which only Linux has")
def test_peak_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """2 and 12 decoder layers of 35 MB: exporting ten more may not cost as much as holding two of them.

    The margin is for the traced graph's nodes, of which ten layers have some 300, some 23 MB, and for the allocator.
    Layers are heavy because one process and the next differ by 15 MB.
    """
    wide = dataclasses.replace(
        SIZES["tiny"],
        text={
            **SIZES["tiny"].text,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 6,
            "mrope_section": [16, 24, 24],
        },
    )
    found = {}
    for layers in (2, 12):
        size = dataclasses.replace(wide, text={**wide.text, "num_hidden_layers": layers})
        checkpoint = export_memory.make_deep(tmp_path / str(layers), size)
        found[layers] = export_memory.measure(str(checkpoint), graphs="thinker")
    weights = {layers: result["weight_bytes"]["thinker"] for layers, result in found.items()}
    more = weights[12] - weights[2]
    assert more > 300 * MIB, "the weights must be heavy enough to be seen"
    assert found[12]["above_torch"] - found[2]["above_torch"] < more / 5
    assert 20 * MIB < found[12]["above_torch"] < 500 * MIB
