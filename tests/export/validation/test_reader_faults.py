"""Faults of our checkpoint reader: export and validation share it, and the reference does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.checkpoint import checkpoint as reading
from omniport.export.checkpoint.safetensors import SafetensorsFile
from omniport.export.exporter import export_checkpoint
from omniport.export.validation.types import FAIL, PASS
from omniport.export.validation.validate import validate
from support.checkpoints import rewritten

_Read = Callable[..., NDArray[Any]]

#: graph or stage that must fail -> end of the name of the tensor that is read with its rows shifted
_SHIFTED = {
    "audio_encoder": "audio_tower.layers.0.self_attn.q_proj.weight",
    "vision_encoder": "visual.blocks.0.attn.q.weight",
    "thinker": "thinker.model.layers.1.mlp.up_proj.weight",
    "talker": "talker.codec_head.weight",
    "dit": "transformer_blocks.0.ff.ff.0.weight",
    "bigvgan": "conv_pre.bias",
    "end_to_end": "thinker.model.embed_tokens.weight",
}


@pytest.mark.parametrize("stage", _SHIFTED)
def test_a_tensor_that_is_read_wrongly_is_found(
    stage: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: _Read = SafetensorsFile.read
    seen = []

    def shifted(file: SafetensorsFile, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        rows = read(file, name, start, stop)
        if not name.endswith(_SHIFTED[stage]):
            return rows
        seen.append(name)
        count = file.entries[name].shape[0]
        whole = np.roll(read(file, name), 1, axis=0)
        return whole[start : count if stop is None else stop]

    monkeypatch.setattr(SafetensorsFile, "read", shifted)
    export_checkpoint(tiny_checkpoint, tmp_path / "bundle", max_context=4096)
    report, _ = validate(tmp_path / "bundle", tiny_checkpoint, graphs=(stage,))
    assert seen
    assert not report.ok
    assert stage in {check.stage for check in report.checks if check.status == FAIL}


def test_a_wrong_choice_of_files_is_found(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tune saved as one file over its sharded base, whose index is left behind."""

    def tuned(tensors: dict[str, torch.Tensor]) -> None:
        tensors["thinker.lm_head.weight"] = -tensors["thinker.lm_head.weight"]

    folder = rewritten(tiny_checkpoint, tmp_path / "tuned", tuned)
    for file in tiny_checkpoint.glob("model*"):
        shutil.copy(file, folder)
    export_checkpoint(folder, tmp_path / "right", max_context=4096)
    report, _ = validate(tmp_path / "right", folder, graphs=("thinker",))
    assert {check.status for check in report.checks} == {PASS}

    monkeypatch.setattr(reading, "_open_weights", lambda path, *_named: reading._open_indexed(path / reading._INDEX))
    export_checkpoint(folder, tmp_path / "wrong", max_context=4096)
    report, _ = validate(tmp_path / "wrong", folder, graphs=("thinker",))
    assert {check.stage for check in report.checks if check.status == FAIL} == {"thinker"}
