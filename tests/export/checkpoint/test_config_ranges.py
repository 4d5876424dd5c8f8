"""Numbers of config.json: each has a range, and what is out of it is refused at once, by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from omniport.export.checkpoint.config import load_config, normalise_config
from omniport.export.planning.shapes import shape_of_config
from omniport.runtime.errors import CheckpointError
from support.json_numbers import changed, numbers


@pytest.fixture(scope="module")
def raw(tiny_checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tiny_checkpoint / "config.json").read_text())
    return config


@pytest.mark.parametrize("value", [10**18, -(10**18), 1e300, float("inf"), float("nan")])
def test_every_number_has_a_range(raw: dict[str, Any], value: float) -> None:
    places = list(numbers(raw))
    assert len(places) > 100
    for where in places:
        name = [key for key in where if isinstance(key, str)][-1]
        with pytest.raises(CheckpointError, match=rf"config.json: \S*{name} is "):
            normalise_config(changed(raw, where, value))


@pytest.mark.parametrize("section", [16, "16", [8, "8"], None])
def test_sections_that_are_none(tmp_path: Path, raw: dict[str, Any], section: Any) -> None:
    raw = copy.deepcopy(raw)
    text = raw["thinker_config"]["text_config"]
    for rope in (text.get("rope_scaling"), text.get("rope_parameters")):
        if rope is not None:
            rope["mrope_section"] = section
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"mrope_section|config.json"):
        load_config(tmp_path)


def test_layers_and_lists_without_end(raw: dict[str, Any]) -> None:
    layers = ("thinker_config", "text_config", "num_hidden_layers")
    with pytest.raises(CheckpointError, match=r"thinker_config.text_config.num_hidden_layers is 1000000; 0 to 1024"):
        shape_of_config(changed(raw, layers, 10**6), "x")
    with pytest.raises(CheckpointError, match="has 5000 items"):
        normalise_config(raw | {"extra": [1] * 5000})
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested more than 32 deep"):
        normalise_config(raw | {"extra": deep})
