"""A backend as a newcomer would add one: this module, and a line in the registry (`BACKENDS`)."""

from __future__ import annotations

from omniport.runtime.backends.base import Loader

from .fake_backend import FakeBackend

LOADER = Loader(
    open=lambda name, bundle, threads: FakeBackend(bundle.manifest),
    problems=lambda name, packages, gpu: [] if packages["numpy"] else ["numpy is not installed"],
)
