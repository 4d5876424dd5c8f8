"""Public names of a package that are loaded on first use, so that importing the package costs next to nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]], extra: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        modules: module, relative to the package or absolute -> public names that it holds.
        extra: what brings the packages that those modules import.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = importlib.import_module(homes[name], package)
        except ModuleNotFoundError as error:
            if not extra or (error.name or "").startswith("omniport"):
                raise
            raise ImportError(
                f"{package}.{name} needs {error.name}, not installed here: pip install 'omniport[{extra}]'"
            ) from error
        value = getattr(home, name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, listed
