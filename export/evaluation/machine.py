"""Describe the machine that figures come from, and choose how many threads to use."""

from __future__ import annotations

import importlib.metadata
import platform

from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.system.host import cpu_name, physical_cores

#: bytes of weights above which graphs are large
_LARGE = 256 << 20


def is_large(bundle: Bundle) -> bool:
    """Whether a bundle's graphs count: in memory, and in work for more than one thread."""
    manifest = bundle.manifest
    return sum(manifest.files[name].size for graph in manifest.graphs.values() for name in graph.data) > _LARGE


def usable_threads(bundle: Bundle) -> int:
    """Threads of one operator.

    One for small graphs: a second waits for work longer than it works, and on a busy machine the first one then waits
    for it (the quick suite of ``tiny`` took 102 s of processor time instead of 30).
    """
    return physical_cores() if is_large(bundle) else 1


def environment(threads: int) -> dict[str, str]:
    """Versions and machine: what a figure may depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu_name()}
    found["threads"] = str(threads)
    for package in ("omniport", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
