"""Activation store that spills to disk: what passes from one layer to the next."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

#: bytes that stay in memory
MEMORY_BYTES = 64 << 20


class Spool:
    """Tensors by key, beyond a number of bytes in files of a folder.

    Args:
        memory: bytes kept in memory; 0 writes everything, so that another process can go on with it.
    """

    def __init__(self, folder: Path, memory: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self._memory = memory
        self._held: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, value: Any) -> None:
        """Keep a tensor, or a tuple of tensors and numbers, in place of what was there."""
        self._forget(key)
        size = _nbytes(value)
        if sum(self._sizes.values()) + size <= self._memory:
            self._held[key], self._sizes[key] = value, size
        else:
            torch.save(value, self._path(key))

    def get(self, key: str) -> Any:
        """What was kept."""
        if key in self._held:
            return self._held[key]
        return torch.load(self._path(key), weights_only=True)

    def drop(self, key: str) -> None:
        """Forget it."""
        self._forget(key)
        self._path(key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._sizes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _forget(self, key: str) -> None:
        self._held.pop(key, None)
        self._sizes.pop(key, None)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.untyped_storage().nbytes())
    return sum(map(_nbytes, value)) if isinstance(value, tuple | list) else 0
