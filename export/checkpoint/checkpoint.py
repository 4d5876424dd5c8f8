"""Open a Qwen2.5-Omni checkpoint: its configuration, and its tensors, read on demand.

A checkpoint is a local folder, a Hugging Face id (``Qwen/Qwen2.5-Omni-3B``) or a ModelScope id
(``modelscope:Qwen/Qwen2.5-Omni-3B``). Only safetensors weights are read; pickled ones are refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from omniport.runtime.errors import CheckpointError
from omniport.runtime.system.files import read_file
from omniport.runtime.system.path_arguments import paths_checked
from omniport.runtime.system.progress import Say

from .config import load_config, read_json
from .hub import locate
from .packed import PackedFormat, PackedWeight, find_packed, packed_format
from .safetensors import SafetensorsFile

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WHOLE, _OF_SHARDS = ".safetensors", ".index.json"

#: hub name pattern -> why a stored tensor of that name is not needed
IGNORED_WEIGHTS: Mapping[str, str] = {
    r"thinker\.audio_tower\.audio_bos_eos_token\.weight": "a parameter that the model's forward never uses",
    r"thinker\.audio_tower\.positional_embedding\.positional_embedding": "sinusoids, computed from the configuration",
    r".*\.(rotary_emb|rotary_pos_emb|rotary_embed)\.(original_)?inv_freq": "computed from rope_theta",
    r"token2wav\..*\.(upsample|downsample)\.filter": "the anti-aliasing filter, computed from its cut-off",
}

#: how transformers 5 names the thinker's parts in memory -> how checkpoints on the hub name them
_RENAMES: Sequence[tuple[str, str]] = (
    ("thinker.model.language_model.", "thinker.model."),
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
    ("thinker.model.visual.", "thinker.visual."),
)


_SPEECH = re.compile(r"(talker|token2wav)\.")
#: names of a thinker saved alone, which may lack its prefix
_THINKER = re.compile(r"(model|audio_tower|visual|lm_head)\.")


class Checkpoint:
    """An opened checkpoint. Tensor names are the hub's, whichever way the file stores them.

    A weight that is stored packed (GPTQ, AWQ) shows as the float32 tensor that it stands for, under its usual name; its
    parts can be read too, and are not listed.

    Attributes:
        name: folder name, or the id as given.
        path: the local folder.
        config: ``transformers.Qwen2_5OmniConfig``, normalised (see `omniport.export.checkpoint.config`).
        fingerprint: sha256 (hex) over config.json, every weight file's header and size, and 64 bytes of each tensor
            (two fine-tunes of one model have equal headers).
        packing: how packed weights are stored; None in an unquantized checkpoint.
        packed: those weights by name.
        lost_speech: config.json says that it speaks, and no weight of talker or token2wav is stored. It is taken for
            one that does not.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        config: Any,
        files: Sequence[SafetensorsFile],
        packing: PackedFormat | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.config = config
        self._files = tuple(files)
        self._where = _index_tensors(files)
        self.lost_speech = bool(config.enable_audio_output) and not any(map(_SPEECH.match, self._where))
        if self.lost_speech:
            config.enable_audio_output = False
        self.packing = packing
        self.packed: dict[str, PackedWeight] = {}
        self.packed = find_packed(packing, set(self._where), self)
        parts = tuple(f"{weight.module}." for weight in self.packed.values())
        self._hidden = {key for key in self._where if key.startswith(parts) and not key.endswith(".bias")}
        self.fingerprint = _fingerprint(path / "config.json", self._files)

    @classmethod
    @paths_checked
    def open(cls, spec: str | os.PathLike[str], progress: Say | None = None) -> Checkpoint:
        """Open a folder, a Hugging Face id, or ``modelscope:`` and an id.

        Args:
            spec: folder or id. A folder of that name wins over an id.
            progress: called with one line of text before each slow step.

        Raises:
            CheckpointError: not a usable Qwen2.5-Omni checkpoint; the message says what to do.
            ExportError: ModelScope was asked for and is not installed.
        """
        name, path = locate(spec, progress)
        config = load_config(path)
        if progress is not None:
            progress(f"reading weight headers of {name}")
        packing = packed_format(read_json(path / "config.json"), path)
        return cls(name, path, config, _open_weights(path, getattr(config, "transformers_weights", None)), packing)

    @property
    def has_speech(self) -> bool:
        """Whether the checkpoint speaks: ``enable_audio_output``, and weights of it."""
        return bool(self.config.enable_audio_output)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the thinker's output head is its token embedding: no head is stored."""
        return "thinker.lm_head.weight" not in self

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self.packed

    def keys(self) -> list[str]:
        """Names of all tensors, sorted; a packed weight counts as one."""
        return sorted((self._where.keys() - self._hidden) | self.packed.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor. CheckpointError if it is missing."""
        if key in self.packed:
            rows, columns = self.packed[key].shape
            return columns, rows
        file, stored = self._find(key)
        return file.entries[stored].shape

    def dtype(self, key: str) -> str:
        """Name of the stored dtype (``bfloat16``, ``float32``, ...). CheckpointError if the tensor is missing."""
        if key in self.packed:
            return "float32"
        file, stored = self._find(key)
        return file.entries[stored].dtype.name

    def read(self, key: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``[start, stop)`` along axis 0, in the stored dtype (``ml_dtypes.bfloat16`` for BF16).

        Only those bytes are read from the file, into an array that belongs to the caller.

        Raises:
            CheckpointError: no such tensor, or the file changed since it was opened.
            ValueError: the rows are not within the tensor.
        """
        if key in self.packed:
            return self.packed[key].dequantized(start, self.shape(key)[0] if stop is None else stop)
        file, stored = self._find(key)
        return file.read(stored, start, stop)

    def forget(self, key: str, start: int = 0, stop: int | None = None) -> None:
        """Drop rows that were read from the page cache: they will not be read again."""
        if key not in self.packed:
            file, stored = self._find(key)
            file.forget(stored, start, stop)

    def expect(self, key: str, shape: Iterable[int]) -> None:
        """Check that a tensor is there with that shape, in a floating-point dtype the exporter reads.

        Raises:
            CheckpointError: names the key, what was got and what was expected.
        """
        got, wanted = self.shape(key), tuple(shape)
        if got != wanted:
            raise CheckpointError(
                f"weight {key!r} of {self.name} has shape {list(got)}, expected {list(wanted)} from config.json: the "
                "configuration and the weights do not belong together."
            )
        if key in self.packed:
            self.packed[key].check()
        dtype = self.dtype(key)
        if dtype not in ("float32", "float16", "bfloat16"):
            raise CheckpointError(
                f"weight {key!r} of {self.name} is {dtype}, expected float32, float16 or bfloat16. Export from the "
                "unquantized checkpoint; omniport quantizes by itself."
            )

    def unused(self, used: set[str]) -> list[str]:
        """Stored tensors that are neither in ``used`` nor known to be needless (`IGNORED_WEIGHTS`), sorted.

        A checkpoint that does not speak may still hold the talker and token2wav; those are needless as well.
        """
        patterns = list(IGNORED_WEIGHTS)
        if not self.has_speech:
            patterns.append(_SPEECH.pattern + ".*")
        ignored = re.compile("|".join(patterns))
        return [key for key in self.keys() if key not in used and not ignored.fullmatch(key) and not self._empty(key)]

    def _empty(self, key: str) -> bool:
        """Whether it is a bias of zeros, which packers give to layers that have none."""
        packed = key.endswith(".bias") and f"{key.removesuffix('.bias')}.weight" in self.packed
        return packed and not self.read(key).any()

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object stored beside the weights, None if there is no such file. CheckpointError if it is not one."""
        path = self.path / name
        return read_json(path) if path.exists() else None

    def _find(self, key: str) -> tuple[SafetensorsFile, str]:
        if key not in self._where:
            raise CheckpointError(
                f"weight {key!r} is missing from {self.name}; it holds {len(self._where)} tensors. "
                + _why_missing(self._where)
            )
        return self._where[key]


def _why_missing(names: Iterable[str]) -> str:
    """What the names of the stored tensors tell about one that is not there."""
    stored = list(names)
    if any(".lora_" in name or ".base_layer." in name for name in stored):
        return (
            "It holds a LoRA adapter that is not merged. Merge it first: load it with peft, call merge_and_unload() "
            "and then save_pretrained(), and export that folder."
        )
    for prefix in ("base_model.model.", "module.", "_orig_mod.", "model.thinker."):
        if any(name.startswith((prefix, f"thinker.{prefix}")) for name in stored):
            return (
                f"Its names begin with {prefix!r}, which a trainer's wrapper put there. Save the model inside the "
                "wrapper (unwrap it, then save_pretrained), and export that folder."
            )
    return "The checkpoint is incomplete, or config.json belongs to another model."


def _hub_name(stored: str) -> str:
    if _THINKER.match(stored):
        stored = f"thinker.{stored}"
    for prefix, hub in _RENAMES:
        if stored.startswith(prefix):
            return hub + stored[len(prefix) :]
    return stored


def _index_tensors(files: Sequence[SafetensorsFile]) -> dict[str, tuple[SafetensorsFile, str]]:
    """Hub name -> file and the name it is stored under. CheckpointError if two tensors get one name."""
    where: dict[str, tuple[SafetensorsFile, str]] = {}
    for file in files:
        for stored in file.entries:
            key = _hub_name(stored)
            if key in where:
                first, name = where[key]
                raise CheckpointError(
                    f"two tensors are named {key!r}: {name!r} in {first.path.name} and {stored!r} in {file.path.name}. "
                    "Shards of two checkpoints may be mixed in this folder; download it again."
                )
            where[key] = (file, stored)
    return where


def _open_weights(path: Path, named: object) -> list[SafetensorsFile]:
    """The checkpoint's weight files, as transformers chooses them.

    Args:
        named: ``transformers_weights`` of config.json, which wins over every other file; None where it is not there.

    Raises:
        CheckpointError: there are none, some are missing, or they are pickles.
    """
    if named is not None:
        return _open_named(path, named)
    # one whole file wins over an index, which a fine-tune saved over its base leaves behind
    for name in (_SINGLE, _INDEX):
        if (path / name).is_file():
            return _open_named(path, name)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if "adapter_model.safetensors" in shards:
        raise CheckpointError(
            f"{path} holds a LoRA adapter. Merge it into its base model and export the merged folder."
        )
    if shards:
        raise CheckpointError(
            f"{path} holds {', '.join(shards[:3])} but neither {_INDEX} nor {_SINGLE}. Add the index file of the "
            f"checkpoint that the shards belong to; one file that holds all weights under another name (a variant) is "
            f'chosen by "transformers_weights" in config.json, and so is an index file.'
        )
    pickles = sorted(
        file.name for pattern in ("pytorch_model*.bin", "*.pth", "model*.pt") for file in path.glob(pattern)
    )
    if pickles:
        raise CheckpointError(
            f"{path} holds pickled weights only ({', '.join(pickles[:3])}). A pickle can run code when it is opened; "
            "omniport reads safetensors alone. Save the model again with save_pretrained(..., safe_serialization=True)."
        )
    raise CheckpointError(f"{path} holds no weights: expected {_INDEX} and its shards, or {_SINGLE}.")


def _open_named(path: Path, name: object) -> list[SafetensorsFile]:
    """One whole file, or the shards of an index."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((_WHOLE, _WHOLE + _OF_SHARDS)):
        raise CheckpointError(
            f"config.json names {name!r} as transformers_weights; expected a *{_WHOLE} or *{_WHOLE}{_OF_SHARDS} in the "
            "same folder. Correct it, or take it out."
        )
    return _open_indexed(path / name) if name.endswith(_OF_SHARDS) else [SafetensorsFile.open(path / name)]


def _open_indexed(index: Path) -> list[SafetensorsFile]:
    """The shards that the index names, checked to lie beside it and to hold what it says, in order of name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map (tensor name -> shard). Download the file again.")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    odd = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if odd:
        raise CheckpointError(f"{index} names {odd[0]!r} as a shard; expected a file name in the same folder.")
    # os.path.exists: a name that no file can have is one that is not there
    missing = sorted(name[:80] for name in names if not os.path.exists(index.parent / name))
    if missing:
        raise CheckpointError(
            f"{index.name} names {len(missing)} shard(s) that are not in {index.parent}: {', '.join(missing)}. "
            "Download the missing files."
        )
    files = {name: SafetensorsFile.open(index.parent / name) for name in sorted(names)}
    lost = sorted(key for key, name in weight_map.items() if key not in files[name].entries)
    if lost:
        raise CheckpointError(
            f"{index.name} places {lost[0]!r} ({len(lost)} tensor(s) in all) in {weight_map[lost[0]]}, which does not "
            "hold it: index and shards belong to different checkpoints. Download them again."
        )
    return list(files.values())


def _fingerprint(config: Path, files: Sequence[SafetensorsFile]) -> str:
    """See `Checkpoint.fingerprint`. Every part is preceded by its length, so that no two inputs run together."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(read_file(config, 1 << 26))
    for file in files:
        add(file.header)
        add(str(file.size).encode())
        with file.path.open("rb", buffering=0) as data:
            for entry in file.entries.values():
                data.seek((entry.begin + entry.end) // 2)
                add(data.read(min(64, entry.end - data.tell())))
    return digest.hexdigest()
