"""Checkpoints of the thinker alone, as fine-tuning tools save them, and the system prompt of what does not speak."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omniport.export.exporter import export_checkpoint
from omniport.export.planning.shapes import find_model
from omniport.export.validation.types import NOT_RUN
from omniport.export.validation.validate import validate
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.events import Done
from omniport.runtime.reply_options import SamplingConfig
from omniport.runtime.session import OmniSession
from support.checkpoints import rewritten
from support.command_line import Omniport
from tokenizers import Tokenizer

_QUESTION = [{"role": "user", "content": "Hello"}]
_HEARING = [name for name, part in PARTS.items() if not part.speaks]


def _alone(prefixed: bool) -> tuple[Any, Any]:
    def weights(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            value = tensors.pop(key)
            if key.startswith("thinker."):
                tensors[key if prefixed else key.removeprefix("thinker.")] = value

    def config(settings: dict[str, Any]) -> None:
        thinker = settings["thinker_config"]
        settings.clear()
        settings.update(thinker, model_type="qwen2_5_omni_thinker")

    return weights, config


def _without_speech(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if not key.startswith("thinker.")]:
        del tensors[key]


def _greedy(bundle: Path) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of a short reply."""
    with OmniSession.open(bundle) as session:
        *_, done = session.reply(_QUESTION, speak=False, thinker=SamplingConfig(max_new_tokens=6))
        assert isinstance(done, Done)
        from omniport.runtime.prompt.builder import build_prompt

        return build_prompt(_QUESTION, session.manifest, session.text_codec).token_ids.tolist(), list(done.token_ids)


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "bare"])
def test_a_thinker_saved_alone_is_a_text_bundle(
    tiny_checkpoint: Path, tmp_path: Path, omniport: Omniport, prefixed: bool
) -> None:
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "thinker", *_alone(prefixed))
    (checkpoint / "spk_dict.pt").unlink()
    report = export_checkpoint(checkpoint, tmp_path / "bundle", max_context=4096)
    assert [graph.name for graph in report.graphs] == _HEARING
    assert report.notes == ()
    assert "talker" not in find_model(str(checkpoint)).decoders
    code, out, err = omniport("validate", tmp_path / "bundle", checkpoint, "-q")
    assert code == 0, out + err
    _assert_default_prompt(tmp_path / "bundle", checkpoint)


def test_what_transformers_saves_of_a_thinker(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    checkpoint = tmp_path / "thinker"
    shutil.copytree(tiny_checkpoint, checkpoint, ignore=shutil.ignore_patterns("model*", "spk_dict.pt", "config.json"))
    Thinker.from_pretrained(tiny_checkpoint, dtype="auto").save_pretrained(checkpoint)
    export_checkpoint(checkpoint, tmp_path / "bundle", max_context=4096)
    _assert_default_prompt(tmp_path / "bundle", checkpoint)


def test_speech_that_is_promised_and_not_stored(tiny_checkpoint: Path, tmp_path: Path, omniport: Omniport) -> None:
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint", _without_speech)
    code, _, err = omniport("export", checkpoint, tmp_path / "bundle", "--max-context", 4096)
    assert code == 0
    assert "the bundle answers in text" in " ".join(err.split())
    _assert_default_prompt(tmp_path / "bundle", checkpoint)


def _assert_default_prompt(bundle: Path, checkpoint: Path) -> None:
    """The prompt is what the checkpoint's own chat template makes of the question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    template = (checkpoint / "chat_template.jinja").read_text()
    text = tokenizer.apply_chat_template(_QUESTION, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert "You are a helpful assistant." in text
    prompt, reply = _greedy(bundle)
    assert prompt == tokenizer(text).input_ids
    assert reply


def test_a_template_without_a_system_message(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint", _without_speech)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    export_checkpoint(checkpoint, tmp_path / "bundle", max_context=4096)
    with OmniSession.open(tmp_path / "bundle") as session:
        assert session.manifest.chat.system_prompt == ""
        with session.turn(speak=False, thinker=SamplingConfig(max_new_tokens=4)) as turn:
            turn.push_text("Hello")
            *_, done = turn.commit()
    assert isinstance(done, Done)
    prompt, _ = _greedy(tmp_path / "bundle")
    tokenizer = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert np.array(prompt[:1]) == tokenizer.token_to_id("<|im_start|>")
    assert done.stats.prompt_tokens == len(prompt)


def test_own_added_tokens_are_listed(tiny_checkpoint: Path, tmp_path: Path, omniport: Omniport) -> None:
    from transformers import AutoTokenizer

    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint", _without_speech)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|emotion_happy|>"]})
    tokenizer.save_pretrained(checkpoint)
    call = ("export", checkpoint, tmp_path / "bundle", "--graphs", "audio_encoder")
    assert "added tokens of the checkpoint: <|emotion_happy|>" in omniport(*call)[2]
    assert json.loads(omniport(*call, "--json")[1])["added_tokens"] == ["<|emotion_happy|>"]


def test_validate_without_a_chat_template(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = rewritten(tiny_checkpoint, tmp_path / "checkpoint", _without_speech)
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").unlink()
    export_checkpoint(checkpoint, tmp_path / "bundle", max_context=4096)
    report, _ = validate(tmp_path / "bundle", checkpoint, graphs=("preprocess", "positions", "audio_encoder"))
    assert report.ok
    skipped = [check for check in report.checks if check.status == NOT_RUN]
    assert {check.stage for check in skipped} == {"preprocess", "positions"}
    assert all("has no chat template" in check.message for check in skipped)
