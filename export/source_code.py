"""Cache keys of source code: sha256 over whole packages, so that a new or moved file changes the key."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def package_digest(*packages: str) -> str:
    """sha256 over every Python file of some packages below `omniport.export`, subpackages included.

    Args:
        packages: folder names, ``"models"``.

    Returns:
        hex digest over paths and contents, in a fixed order.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for package in packages:
        files = sorted((here / package).rglob("*.py"))
        if not files:
            raise ValueError(f"no package {package!r} in {here.name}")
        for file in files:
            digest.update(f"{file.relative_to(here).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
