"""Cache keys: sha256 over values, and over whole packages of source code, so that a moved file changes the key."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

import msgspec

#: what a traced graph depends on besides this package
_TRACED_BY = ("torch", "onnx", "onnxscript", "onnx-ir")


def json_key(*values: object) -> str:
    """sha256 over values as JSON."""
    return hashlib.sha256(msgspec.json.encode(values)).hexdigest()


@cache
def tracing_key(*packages: str) -> str:
    """sha256 over these packages (as in `package_digest`) and the versions of what traces graphs."""
    return json_key(package_digest(*packages), [importlib.metadata.version(name) for name in _TRACED_BY])


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
