"""Run the reference: transformers' modules, one part in memory at a time, with results cached on disk.

A result is keyed by the checkpoint's fingerprint and files, the part, the case and the library versions, so a second
backend or precision does not compute it again. It is stored as .npz under the cache folder (see
`omniport.runtime.system.files.cache_folder`); with the cache switched off every result is computed anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omniport.runtime.system.files import cache_folder, replacing
from omniport.runtime.system.host import collect_and_trim
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..evaluation.reference_modules import load_reference
from ..source_code import json_key

Arrays = dict[str, NDArray[Any]]


def array_key(*arrays: NDArray[Any]) -> str:
    """Short hash of array contents, for case names that must change with their input."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class Reference:
    """Results of the reference's parts. At most one part is loaded; loading another releases it first."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._name = ""
        self._module: nn.Module | None = None
        versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
        # the fingerprint is of the files that our reader chose, and the reference is to find that it chose wrongly
        files = sorted(f"{file.name} {file.stat().st_size}" for file in checkpoint.path.glob("*.safetensors*"))
        self._salt = [checkpoint.fingerprint, *files, *versions]

    def part(self, graph: str) -> nn.Module:
        """The transformers module behind a graph (see `load_reference`)."""
        if self._name != graph or self._module is None:
            self._module = None
            collect_and_trim()  # of the part before, and of what made the inputs
            self._module, self._name = load_reference(self.checkpoint, graph), graph
        return self._module

    def release(self) -> None:
        """Drop the part that is loaded."""
        if self._module is not None:
            self._module, self._name = None, ""
            collect_and_trim()

    def result(self, graph: str, case: str, run: Callable[[nn.Module], Mapping[str, torch.Tensor]]) -> Arrays:
        """Named float32 or int64 arrays that ``run`` computes with the part, from the cache if they are there.

        Args:
            graph: the part.
            case: everything the result depends on besides the weights (inputs: by `array_key`).
        """
        path = self._path(graph, case)
        if path is not None and (kept := _load(path)) is not None:
            return kept
        with torch.no_grad():
            computed = {name: _numpy(tensor) for name, tensor in run(self.part(graph)).items()}
        if path is not None:
            _store(path, computed)
        return computed

    def _path(self, graph: str, case: str) -> Path | None:
        folder = cache_folder()
        if folder is None:
            return None
        key = json_key(*self._salt, graph, case)
        return folder / "reference" / f"{graph}-{key[:40]}.npz"


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor.long()).contiguous().numpy().copy()


def _load(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _store(path: Path, arrays: Arrays) -> None:
    """A cache that cannot be written costs time, not the run."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
