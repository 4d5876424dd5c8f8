"""The tokenizer of a bundle reads text as transformers does with the checkpoint, whatever its files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.checkpoint.frontends import special_tokens
from omniport.export.checkpoint.tokenizer_json import load_tokenizer, own_tokens, tokenizer_json
from omniport.export.evaluation.probe import PROBE
from omniport.runtime.errors import CheckpointError
from omniport.runtime.prompt.tokenizer import TextCodec
from tokenizers import Tokenizer

Json = dict[str, Any]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint whose text files are its own, and its weights links."""
    out = tmp_path / "model"
    out.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.suffix == ".safetensors":
            (out / file.name).symlink_to(file)
        else:
            shutil.copy(file, out)
    return out


def edit(path: Path, change: Callable[[Json], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def agree(folder: Path, tmp_path: Path) -> None:
    """Probe and added tokens: the stored file itself, and through the runtime but for control tokens."""
    reference, ckpt = theirs(folder), Checkpoint.open(folder)
    ours = load_tokenizer(ckpt)
    added = [token.content for token in reference.added_tokens_decoder.values()]
    for text in (PROBE, f"a{'b '.join(added)}", " ".join(added)):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == reference(text, add_special_tokens=False).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids)
    assert ours.get_added_tokens_decoder().keys() == reference.added_tokens_decoder.keys()
    (tmp_path / "stored.json").write_bytes(tokenizer_json(ckpt))
    codec = TextCodec.from_file(tmp_path / "stored.json", special_tokens(ckpt))
    ids = codec.encode(PROBE)
    assert ids == reference(PROBE, add_special_tokens=False).input_ids
    assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def published(document: Json) -> None:
    """The layout of the file that Qwen publishes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    document["pre_tokenizer"]["pretokenizers"][1] = level
    document["post_processor"] = document["decoder"] = level
    document["model"].update(
        continuing_subword_prefix="", end_of_word_suffix="", dropout=None, unk_token=None, fuse_unk=False
    )
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    document["model"].pop("ignore_merges", None)


@pytest.mark.parametrize("change", [lambda _: None, published], ids=["ours", "published"])
def test_a_usual_file_is_stored_byte_for_byte(folder: Path, tmp_path: Path, change: Callable[[Json], object]) -> None:
    edit(folder / "tokenizer.json", change)
    assert tokenizer_json(Checkpoint.open(folder)) == (folder / "tokenizer.json").read_bytes()
    agree(folder, tmp_path)


def _split(document: Json) -> None:
    document["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": False})


def _pattern(document: Json) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{L}+|\p{N}+"}


def _whole_words(document: Json) -> None:
    document["model"]["ignore_merges"] = True
    document["model"]["merges"] = document["model"]["merges"][:50]


EDITS: dict[str, Callable[[Json], object]] = {
    "no normalizer": lambda d: d.update(normalizer=None),
    "lowercase": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "replace": lambda d: d.update(normalizer={"type": "Replace", "pattern": {"String": "qzq"}, "content": "x"}),
    "digits": _split,
    "pattern": _pattern,
    "prefix space": lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "decoder": lambda d: d.update(decoder={"type": "Fuse"}),
    "ignore_merges": _whole_words,
    "byte_fallback": lambda d: d["model"].update(byte_fallback=True),
    "dropout": lambda d: d["model"].update(dropout=0.5),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_edits_of_tokenizer_json_count_as_far_as_transformers_reads_them(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """Qwen2's class reads vocabulary and merges only, the general one everything."""
    edit(folder / "tokenizer.json", EDITS[name])
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class=kind))
    if type(theirs(folder)).__name__ == "Qwen2Tokenizer" or name not in ("dropout", "replace", "decoder"):
        agree(folder, tmp_path)
    elif name != "dropout":
        stored = tokenizer_json(Checkpoint.open(folder))
        assert Tokenizer.from_str(stored.decode()).encode("Qqzq").ids == theirs(folder)("Qqzq").input_ids


@pytest.mark.parametrize("place", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("built", [False, True], ids=["stored", "built"])
def test_tokens_that_stand_in_tokenizer_config_only(folder: Path, tmp_path: Path, place: str, built: bool) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update({place: ["<|mine|>", "<|yours|>"]}))
    if built:
        (folder / "tokenizer.json").unlink()
    ckpt = Checkpoint.open(folder)
    assert own_tokens(tokenizer_json(ckpt)) == ("<|mine|>", "<|yours|>")
    agree(folder, tmp_path)


def test_transformers_cannot_load_it(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="NobodysTokenizer", auto_map={}))
    edit(folder / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=7))
    with pytest.raises(CheckpointError, match=r"transformers cannot load the tokenizer of .*Copy"):
        tokenizer_json(Checkpoint.open(folder))


def test_an_added_token_that_transformers_does_not_read_is_not_dropped_silently(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|mine|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"added token '<\|mine\|>' with id \d+, and .* tokenizer_config.json"):
        tokenizer_json(Checkpoint.open(folder))
