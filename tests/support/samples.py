"""Sample media from scripts/sample_media.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from support.paths import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "sample_media.py"


def make_samples(out: Path) -> dict[str, Path]:
    """A spoken question, a picture and a clip with sound, by kind: audio, image, video."""
    spec = importlib.util.spec_from_file_location("sample_media", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Path] = module.make_media(out)
    return made
