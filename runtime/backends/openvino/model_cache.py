"""Cache of compiled graphs, which OpenVINO reads and writes itself.

Converting and compiling a graph takes seconds whenever a session is opened. What comes out lies in the user's own
cache folder, in a folder for the files that it was made from, the version that made it and its options. A folder that
others may write to is not used: what lies there is run.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.graph_spec import GraphSpec
from ...bundle.reader import Bundle
from ...system.files import cache_folder

#: bytes of weights; what is compiled holds them all, and larger graphs would fill a disk
_MOST_WEIGHTS = 1 << 30


def compiled_folder(bundle: Bundle, spec: GraphSpec, version: str, options: Mapping[str, Any]) -> Path | None:
    """The folder for a graph, which is there; None where nothing is to be kept (``OMNIPORT_CACHE`` is empty, or the
    folder cannot be made or trusted), and for decoders and encoders: read back, OpenVINO 2026.4 gives NaN or
    wrong values for theirs.

    Args:
        version: of OpenVINO. options: that the graph is compiled with: OpenVINO itself takes what was compiled in
            bfloat16 for what is asked for in float32.
    """
    base = cache_folder()
    records = [bundle.manifest.files[file] for file in (spec.file, *spec.data)]
    if (
        base is None
        or spec.cache
        or spec.name.endswith("_encoder")
        or sum(record.size for record in records) > _MOST_WEIGHTS
    ):
        return None
    made = "\n".join((version, repr(sorted(options.items())), *(record.sha256.lower() for record in records)))
    folder = base / "openvino" / f"{spec.name}-{hashlib.sha256(made.encode()).hexdigest()[:32]}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError:
        return None
    others = sys.platform != "win32" and (facts.st_uid != os.geteuid() or facts.st_mode & 0o022)
    return None if others or folder.is_symlink() else folder
