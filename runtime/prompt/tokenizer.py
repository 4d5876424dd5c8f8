"""Encode and decode text with the byte-level BPE of the bundle's tokenizer.json.

User text can never become a control token that frames a message: those are encoded as the ordinary characters they are
made of, and the prompt builder puts their ids in by itself. Other added tokens of a checkpoint are read from text.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders

from ..bundle.manifest import SpecialTokens
from ..errors import BundleError, PromptError
from ..system.files import read_text
from ..system.foreign import foreign
from ..system.stderr import dropped_from_stderr

#: Qwen2's split: contractions, words with one leading mark, single digits, punctuation runs, line ends, spaces
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: longest stretch of text that is encoded (characters); a context of 32,768 tokens holds an eighth of that in English
MAX_TEXT = 1 << 20
#: characters that are counted at once, and tokens that a cut between two blocks may add
_BLOCK, _CUT = 1 << 16, 64


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE vocabulary (GPT-2's table), reversed."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    alphabet = {chr(byte): byte for byte in shown}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF = _byte_alphabet()
#: what a panic prints: a search with a split of somebody's own may go beyond the library's limits
_PANIC = re.compile(rb"\s*$|thread '|Onig: |stack backtrace:| +\d+: | +at |note: ")


#: parts of a tokenizer.json, and the types that they may be made of
_COMPONENTS: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset({"NFC", "NFD", "NFKC", "NFKD", "Sequence", "Lowercase", "Strip", "StripAccents"}),
    "pre_tokenizer": frozenset({"Sequence", "Split", "ByteLevel", "Digits", "Punctuation", "Whitespace"}),
    "model": frozenset({"BPE"}),
    "decoder": frozenset({"ByteLevel", "Sequence", "Fuse"}),
    "post_processor": frozenset({"ByteLevel", "Sequence", "TemplateProcessing"}),
}


class TextCodec:
    """The tokenizer of one bundle.

    Args:
        tokenizer: byte-level BPE; it is changed in place (control tokens are marked special and never matched in text).
        tokens: ids of the control tokens.
        special: ids that are left out of a reply's text, besides those that the tokenizer calls special.

    Raises:
        BundleError: the tokenizer is not byte-level, or lacks a control token that the manifest names.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: SpecialTokens, special: frozenset[int] = frozenset()) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise BundleError(
                f"the tokenizer's decoder is {type(tokenizer.decoder).__name__}; byte-level BPE (ByteLevel) was "
                "expected. Export the bundle again from a Qwen2.5-Omni checkpoint"
            )
        control = {name: int(token_id) for name, token_id in msgspec.structs.asdict(tokens).items()}
        contents = {name: tokenizer.id_to_token(token_id) for name, token_id in control.items()}
        missing = [f"{name}={control[name]}" for name, content in contents.items() if content is None]
        if missing:
            raise BundleError(
                f"the tokenizer has no token for {', '.join(missing)}, which bundle.json names as control tokens. "
                "tokenizer.json and bundle.json are not from the same export: export the bundle again"
            )
        # A trainer's settings, which transformers sets anew at every call.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.model.dropout = None  # merges left out at random, for training
        # A fine-tune may have saved a control token as an ordinary added token, which plain text would match.
        tokenizer.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in contents.values() if c])
        tokenizer.encode_special_tokens = True
        for name, content in contents.items():
            if tokenizer.token_to_id(str(content)) != control[name] or control[name] in self._ids(tokenizer, content):
                raise BundleError(
                    f"the tokenizer reads the plain text {content!r} as control token {name}={control[name]}, "
                    "so a message could forge control tokens. Export the bundle again from a Qwen2.5-Omni checkpoint"
                )
        self._tokenizer = tokenizer
        patterns = set(_fields(tokenizer.pre_tokenizer, "Regex"))
        self._own_split = not patterns <= {SPLIT}
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special) | special
        self._markers = [token.content for token in added.values() if re.fullmatch(r"<.+>", token.content)]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], tokens: SpecialTokens) -> TextCodec:
        """Read tokenizer.json.

        Raises:
            BundleError: the file is missing or not a tokenizer, or see the class.
        """
        with foreign(
            BundleError,
            f"cannot read the tokenizer {os.fspath(path)}",
            "A Hugging Face tokenizer.json was expected: export the bundle again",
        ):
            text, special = _only_control_tokens_special(read_text(path, 1 << 28), tokens)
            tokenizer = Tokenizer.from_str(text)
            _refuse_unknown_components(tokenizer)
        return cls(tokenizer, tokens, special)

    def count(self, text: str, most: int) -> int:
        """Tokens of ``text``; more than ``most``, but not how many, of text that is far longer.

        Raises:
            PromptError: see ``encode``.
        """
        if len(text) > _BLOCK:  # a tokenizer takes 170 bytes of memory a character: whole blocks are counted first
            counted = 0
            for start in range(0, len(text), _BLOCK):
                counted += len(self.encode(text[start : start + _BLOCK])) - _CUT
                if counted > most:
                    return counted
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, in which nothing is a control token.

        Raises:
            PromptError: the text is not valid Unicode (lone surrogates), longer than ``MAX_TEXT``, or too much for a
                split of the bundle's own.
        """
        if len(text) > MAX_TEXT:
            raise PromptError(f"the text has {len(text)} characters, at most {MAX_TEXT} are taken; shorten it")
        hushed: AbstractContextManager[object] = dropped_from_stderr(_PANIC) if self._own_split else nullcontext()
        with foreign(PromptError, "the bundle's tokenizer fails on this text", "Shorten it"), hushed:
            try:
                return self._ids(self._tokenizer, text)
            except TypeError as error:
                bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
                if bad is None:
                    raise
                raise PromptError(
                    f"the text holds a lone surrogate ({text[bad]!r}) at character {bad}; valid Unicode text was "
                    "expected. Decode the text with the right encoding, or drop that character"
                ) from error

    def marker_in(self, text: str) -> str | None:
        """A control token, or another added one that is written like a tag, which ``text`` spells."""
        return next((marker for marker in self._markers if marker in text), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``: special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([i for i in ids if i not in self._special], skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder for one reply, fed one token at a time."""
        return TextStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; none for special tokens and for ids without a token."""
        if token_id in self._special:
            return b""
        content = self._tokenizer.id_to_token(token_id)
        if content is None:  # the embedding table is padded past the vocabulary
            return b""
        try:
            return bytes(_BYTE_OF[c] for c in content)
        except KeyError:  # an added token holds its text as it is, not in the byte alphabet
            return content.encode()

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str | None) -> list[int]:
        return tokenizer.encode(text or "", add_special_tokens=False).ids


class TextStream:
    """Incremental detokenisation: ``push`` every token, then ``flush``; the pieces join to what ``decode`` gives."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        # UTF-8 is self-synchronising, so a byte decoder with state is exact and costs the same for every token.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that this token completed; empty while a character is unfinished and for special tokens."""
        return self.take(self._codec.token_bytes(token_id))

    def take(self, data: bytes) -> str:
        """Text that these bytes of a token completed."""
        return self._utf8.decode(data)

    def flush(self) -> str:
        """U+FFFD if the last character never was finished, else nothing. The stream can be used anew afterwards."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _refuse_unknown_components(tokenizer: Tokenizer) -> None:
    """Raises:
    ValueError: the tokenizer has a component that no Qwen tokenizer is made of: nobody has tried what it does to text.
    """
    for place, known in _COMPONENTS.items():
        component: Any = getattr(tokenizer, place)
        found = [type(component).__name__] if place == "model" else _fields(component, "type")
        if unknown := [kind for kind in found if kind not in known]:
            raise ValueError(f"its {place} has a {unknown[0]}; known are {', '.join(sorted(known))}")


def _fields(component: Any, name: str) -> list[str]:
    """Texts of that name in a component, and in those inside."""
    if component is None:
        return []
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            found.extend([value[name]] if isinstance(value.get(name), str) else [])
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(inner)

    look(json.loads(component.__getstate__()))
    return found


def _only_control_tokens_special(document: str, tokens: SpecialTokens) -> tuple[str, frozenset[int]]:
    """A tokenizer.json in which no added token but those that frame a message is special, and the ids that were.

    Special tokens are not looked for in text, so that nobody can write one. A checkpoint's own added tokens are for
    writing. The list is replaced in the text: reading the vocabulary as well would take longer than all the rest.
    """
    control = frozenset(msgspec.structs.asdict(tokens).values())
    found = re.search(r'"added_tokens"\s*:\s*', document)
    if found is None:
        return document, frozenset()
    added, end = json.JSONDecoder().raw_decode(document, found.end())
    special = frozenset(int(token["id"]) for token in added if token["special"])
    for token in added:
        token["special"] = token["id"] in control
    return document[: found.end()] + json.dumps(added) + document[end:], special
