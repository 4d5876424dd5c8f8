"""The package ``openvino``: whether it is here, and what installs it."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import BackendError
from ...system import host

INSTALL = "pip install 'omniport[openvino]'"
#: the first that computes our graphs as they are
MIN_VERSION = (2026, 4)


def import_openvino() -> Any:
    """openvino, imported when it is first needed.

    Raises:
        BackendError: it is not installed, is too old, or lacks files; says what to install.
    """
    try:
        module = importlib.import_module("openvino")
    except ImportError as error:
        raise BackendError(f"openvino is not installed ({error}): {INSTALL}") from error
    except Exception as error:  # a broken native library can raise anything
        raise BackendError(f"openvino does not import ({type(error).__name__}: {error}): {INSTALL}") from error
    version = getattr(module, "__version__", "")  # a folder that an uninstalled package left behind has none
    if host.version_numbers(version.partition("-")[0]) < MIN_VERSION:
        newer = ".".join(map(str, MIN_VERSION))
        raise BackendError(f"openvino {version or 'without its files'} is here, and {newer} is needed: {INSTALL}")
    return module


def why_not() -> str:
    """Why OpenVINO cannot be used here, and what mends it; empty if it can. Imports it."""
    try:
        import_openvino()
    except BackendError as error:
        return str(error)
    return ""
