"""Measure the memory and size of engine builds, one process a build, and print them as JSON.

    python scripts/measure_build_memory.py BUNDLE [--graphs thinker,talker] [--target rtx-4090] [--ways ours,plain,two]

Ways: ``ours``, as omniport builds: weights by address, mapped pages let go of, the engine streamed to its file.
``plain``: the parser reads the file and the engine comes back as one block of memory. The others are as ours, with

- ``two`` (decoders): a second profile for new_tokens = 1;
- ``one`` (vision encoder): one profile, without classes of images;
- ``lean``, ``two-lean``: as ours and as ``two``, with the builder asked to spend no weights on further profiles;
- ``opt-least``, ``opt-most``: one profile, with its optimum at the smallest or largest shape;
- ``level0``: builder optimization level 0;
- ``one-tactic``: one tactic a layer is tried;
- ``workspace``: 64 MiB of workspace;
- ``stripped``: weights left out of the engine, which cannot run until it is refitted;
- ``one-arena``: one heap for all threads; ``trim``: one heap that gives memory back at once;
- ``no-parser``: the parser and the ONNX file's nodes let go of before the build.

Memory is resident memory above that before parsing, sampled every 10 ms: all of it, and the anonymous part alone, which
the kernel cannot drop and read again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest import mock


def measure(bundle: Path, graph: str, target: str, way: str = "ours") -> dict[str, Any]:
    """Build one engine in a process of its own.

    Returns:
        weights_bytes, engine_bytes, seconds, peak_bytes, anonymous_bytes, layers; or failed, the message of a build
        that did not go well.
    """
    command = [sys.executable, __file__, "--child", str(bundle), graph, target, way]
    environment = {**os.environ, **ENVIRONMENTS.get(way, {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class _Sampler:
    """Largest resident memory, all and anonymous, above the start."""

    def __init__(self) -> None:
        from omniport.export.memory import resident

        self._resident = resident
        self._fields = ("VmRSS", "RssAnon")
        self._start = {field: resident(field) for field in self._fields}
        self.peak = dict.fromkeys(self._fields, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for field in self._fields:
                self.peak[field] = max(self.peak[field], self._resident(field) - self._start[field])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _child(folder: str, graph: str, target: str, way: str) -> dict[str, Any]:
    from omniport.export.devices.detect import find_target
    from omniport.export.tensorrt import engine_builder as engine
    from omniport.export.tensorrt.builder_api import load_api
    from omniport.runtime.bundle.reader import Bundle
    from omniport.runtime.errors import BuildError

    bundle, api = Bundle.open(folder), load_api("tensorrt-rtx")
    spec = bundle.manifest.graphs[graph]
    if way == "plain":
        api.features = dataclasses.replace(api.features, mapped_weights=False, streamed_engine=False)
    configure, profiles = engine._configure, PROFILES.get(way.removesuffix("-lean"), engine.make_profiles)

    def configured(api: Any, parsed: Any, *arguments: Any) -> Any:
        if way.endswith("lean"):
            parsed.builder = _Lean(parsed.builder)
        if way == "no-parser":
            parsed.parser = None
            parsed.onnx_file._model.Clear()
        config = configure(api, parsed, *arguments)
        CONFIGS.get(way, lambda *_: None)(api.module, config)
        return config

    about = {"graph": graph, "precision": bundle.manifest.precision, "target": target, "way": way}
    sampler = _Sampler()
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(engine, "make_profiles", profiles),
        mock.patch.object(engine, "_configure", configured),
    ):
        out = Path(scratch) / "engine"
        try:
            built = engine.build_engine(api, bundle.path(spec.file), spec, find_target(target), out)
        except BuildError as error:
            return {**about, "failed": str(error)}
        finally:
            sampler.stop()
        return {
            **about,
            "weights_bytes": built.weights_bytes,
            "engine_bytes": out.stat().st_size,
            "seconds": round(built.seconds, 1),
            "peak_bytes": sampler.peak["VmRSS"],
            "anonymous_bytes": sampler.peak["RssAnon"],
            "layers": built.layers,
        }


class _Lean:
    """A builder whose profiles ask for no memory of their own."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def create_optimization_profile(self) -> Any:
        profile = self._builder.create_optimization_profile()
        profile.extra_memory_target = 0.0
        return profile


def _two_profiles(spec: Any, dims: Any, *_: Any) -> Any:
    from omniport.export.tensorrt.profiles import make_profiles
    from omniport.runtime.bundle.graph_spec import DimRange

    (whole,) = make_profiles(spec, dims)
    (decode,) = make_profiles(spec, {**dims, "new_tokens": DimRange(1, 1, 1)})
    return whole, decode


def _one_profile(spec: Any, dims: Any, *_: Any) -> Any:
    from omniport.export.tensorrt.profiles import make_profiles

    return make_profiles(spec, dims)


def _optimum(end: str) -> Any:
    """One profile with every dimension's optimum at one end of its range."""

    def make(spec: Any, dims: Any, *_: Any) -> Any:
        from omniport.runtime.bundle.graph_spec import DimRange

        moved = {name: DimRange(span.min, getattr(span, end), span.max) for name, span in dims.items()}
        return _one_profile(spec, moved)

    return make


def _level0(module: Any, config: Any) -> None:
    config.builder_optimization_level = 0


def _one_tactic(module: Any, config: Any) -> None:
    config.max_num_tactics = 1


def _workspace(module: Any, config: Any) -> None:
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, 64 << 20)


def _stripped(module: Any, config: Any) -> None:
    config.set_flag(module.BuilderFlag.STRIP_PLAN)


#: way -> the profiles that it has in place of ours
PROFILES: dict[str, Any] = {
    "two": _two_profiles,
    "one": _one_profile,
    "opt-least": _optimum("min"),
    "opt-most": _optimum("max"),
}
#: way -> what it does to the builder's configuration
CONFIGS: dict[str, Any] = {
    "level0": _level0,
    "one-tactic": _one_tactic,
    "workspace": _workspace,
    "stripped": _stripped,
}
#: way -> settings of glibc's heap
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "one-arena": {"MALLOC_ARENA_MAX": "1"},
    "trim": {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"},
}
WAYS = ("ours", "plain", *PROFILES, "lean", "two-lean", *CONFIGS, *ENVIRONMENTS, "no-parser")


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_child(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description="Measure the memory of engine builds.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", default="thinker,talker", help="comma-separated names")
    parser.add_argument("--target", default="rtx-4090")
    parser.add_argument("--ways", default="ours,plain", help=f"comma-separated: {', '.join(WAYS)}")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for graph in options.graphs.split(","):
        for way in options.ways.split(","):
            try:
                rows.append(measure(options.bundle, graph, options.target, way))
            except subprocess.CalledProcessError as error:  # the reason is on stderr
                rows.append({"graph": graph, "target": options.target, "way": way, "failed": str(error)})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
