"""The files that the checkpoint's weights are in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from wren import frame


def test_the_talker_s_file_holds_all_that_its_training_changes(tmp_path: Path) -> None:
    table = "thinker.model.language_model.embed_tokens.weight"
    names = (table, "thinker.lm_head.weight", "talker.codec_head.weight", "token2wav.code2wav_dit_model.proj_out.bias")
    frame.write_weights(tmp_path, {name: torch.full((2, 2), float(n)) for n, name in enumerate(names)})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {name: set(load_file(tmp_path / name)) for name in set(index["weight_map"].values())}
    assert sorted(files) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {key: name for name, keys in files.items() for key in keys} == index["weight_map"]
    assert files["model-00002-of-00003.safetensors"] == {"talker.codec_head.weight", frame.hub_key(table)}
    assert index["metadata"]["total_size"] == len(names) * 4 * 2
