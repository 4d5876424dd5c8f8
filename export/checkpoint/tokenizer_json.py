"""Make a bundle's tokenizer.json: the checkpoint's own where transformers reads text so, else transformers'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omniport.runtime.bundle.staging import write_error
from omniport.runtime.errors import CheckpointError
from omniport.runtime.prompt.tokenizer import SPLIT
from omniport.runtime.system.files import read_text, scratch_folder
from omniport.runtime.system.foreign import foreign
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .checkpoint import Checkpoint
from .config import quiet_transformers
from .control_tokens import CONTROL_TOKENS

#: what transformers makes a tokenizer from
_TEXT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@lru_cache(maxsize=1)
def tokenizer_json(ckpt: Checkpoint) -> bytes:
    """The tokenizer that transformers reads the checkpoint's text with.

    It is tokenizer.json as stored, or one built from vocab.json, merges.txt and the added tokens, if that reads text in
    the same way. transformers may read otherwise: some of its classes take no more than vocabulary and merges from the
    file, and tokens that stand only in tokenizer_config.json are added.

    Raises:
        CheckpointError: neither is there, what is there cannot be loaded, here or by transformers, or tokenizer.json
            has an added token that transformers does not read from there.
    """
    own, reference = _own(ckpt), _of_transformers(ckpt)
    here, there = _reading(Tokenizer.from_str(own.decode())), _reading(reference)
    if here == there:
        return own
    for text, token in here["added"].items():
        if there["added"].get(text, {}).get("id") != token["id"]:
            raise CheckpointError(
                f"tokenizer.json of {ckpt.name} has the added token {text!r} with id {token['id']}, and transformers "
                "does not read it from there: enter it in added_tokens_decoder of tokenizer_config.json, or drop it."
            )
    _reset(reference)
    return bytes(reference.to_str(), "utf-8")


def _own(ckpt: Checkpoint) -> bytes:
    """The checkpoint's tokenizer.json, without what a trainer left in it, or one built from its other files."""
    path = ckpt.path / "tokenizer.json"
    if path.exists():
        data = _read(path)
        tokenizer = _load(data, str(path))
        return bytes(tokenizer.to_str(), "utf-8") if _reset(tokenizer) else data
    vocab = ckpt.json("vocab.json")
    merges = ckpt.path / "merges.txt"
    if vocab is None or not merges.exists():
        raise CheckpointError(
            f"{ckpt.name} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt. Copy them from the "
            "base model."
        )
    return tokenizer_from_vocab(vocab, _read_merges(ckpt), _added_tokens(ckpt))


def _of_transformers(ckpt: Checkpoint) -> Tokenizer:
    """transformers' tokenizer of the checkpoint."""
    from transformers import AutoTokenizer

    problem = f"transformers cannot load the tokenizer of {ckpt.name}"
    remedy = "Copy the tokenizer files of the base model."
    with quiet_transformers(), scratch_folder() as folder:
        for name in _TEXT_FILES:  # transformers takes no byte order mark
            if (ckpt.path / name).exists():
                data = _read(ckpt.path / name)
                try:
                    (folder / name).write_bytes(data)
                except OSError as error:
                    raise write_error(error, folder / name) from error
        with foreign(CheckpointError, problem, remedy):
            loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # a copy: what is reset here, transformers sets by itself
            return Tokenizer.from_str(loaded.backend_tokenizer.to_str())


def _reset(tokenizer: Tokenizer) -> bool:
    """Switch off what a trainer left in a file and transformers sets anew at every call; whether there was any."""
    if tokenizer.truncation is None and tokenizer.padding is None and not tokenizer.model.dropout:
        return False
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.model.dropout = None
    return True


def _reading(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides how a tokenizer reads and writes text: equal ones do the same."""
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    # Offsets, and what is put around a text, are not used here; dropout is switched off.
    split = _without(document["pre_tokenizer"], {"trim_offsets"})
    # ByteLevel has one way back, whatever its options
    decoder = _without(document["decoder"], {"trim_offsets", "add_prefix_space", "use_regex"})
    model = {name: value or None for name, value in document["model"].items() if name != "dropout"}
    added = {token["content"]: token for token in document["added_tokens"]}
    return {"normalizer": document["normalizer"], "split": split, "decoder": decoder, "model": model, "added": added}


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without(item, names) for name, item in value.items() if name not in names}


def own_tokens(stored: bytes) -> tuple[str, ...]:
    """Added tokens of a tokenizer.json that the published models do not have, by id."""
    added = Tokenizer.from_str(stored.decode()).get_added_tokens_decoder()
    return tuple(token.content for _, token in sorted(added.items()) if token.content not in CONTROL_TOKENS)


def load_tokenizer(ckpt: Checkpoint) -> Tokenizer:
    """`tokenizer_json`, loaded."""
    return _load(tokenizer_json(ckpt), f"the tokenizer of {ckpt.name}")


def tokenizer_from_vocab(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special_tokens: Mapping[int, AddedToken | str]
) -> bytes:
    """A tokenizer.json of Qwen2's construction: NFC, Qwen2's split, byte-level BPE.

    Args:
        vocab: token, in the byte alphabet, -> id.
        merges: pairs in order of priority.
        special_tokens: id -> added token; a plain string is a special token that never spans spaces. Ids must follow
            the vocabulary without a gap, or be those of vocabulary entries.

    Raises:
        CheckpointError: merges that the vocabulary cannot hold, or an id that cannot be kept.
    """
    problem, remedy = "vocab.json and merges.txt do not make a BPE tokenizer", "Copy them from the base model."
    with foreign(CheckpointError, problem, remedy):
        tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token_id, token in sorted(special_tokens.items()):
        added = AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
        # One at a time: the library hands out the next free id, and special and plain tokens interleave.
        tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens([added])
        got = tokenizer.token_to_id(added.content)
        if got != token_id:
            raise CheckpointError(
                f"added token {added.content!r} would get id {got}, expected {token_id}: ids of added tokens must "
                "follow the vocabulary without a gap. Use a checkpoint that has tokenizer.json."
            )
    return tokenizer.to_str().encode("utf-8")


def _load(data: bytes, where: str) -> Tokenizer:
    with foreign(CheckpointError, f"{where} cannot be loaded as a tokenizer", "Download it again."):
        return Tokenizer.from_str(data.decode("utf-8"))


def _read(path: Path) -> bytes:
    try:
        return read_text(path, 1 << 28).encode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _read_merges(ckpt: Checkpoint) -> list[tuple[str, str]]:
    path = ckpt.path / "merges.txt"
    lines = _read(path).decode("utf-8").split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{path}, line {number}: {line!r} is not a pair of tokens. Download the file again.")
        merges.append((pair[0], pair[1]))
    return merges


def _added_tokens(ckpt: Checkpoint) -> dict[int, AddedToken | str]:
    """Added tokens by id: tokenizer_config.json's, else those of the older added_tokens.json."""
    config = ckpt.json("tokenizer_config.json") or {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        try:
            return {
                int(token_id): AddedToken(info["content"], **{flag: bool(info.get(flag)) for flag in _TOKEN_FLAGS})
                for token_id, info in decoder.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"tokenizer_config.json of {ckpt.name}: added_tokens_decoder holds an entry that is not an added token "
                f"({json.dumps(str(error))}). Download the file again."
            ) from error
    older = ckpt.json("added_tokens.json") or {}
    return {token_id: token for token, token_id in older.items()}
