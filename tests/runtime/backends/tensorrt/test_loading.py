"""Which engines are loaded over the stand-in of fake_device.py, and what is refused. No engine runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from omniport.runtime import OmniSession
from omniport.runtime.backends.tensorrt.backend import TrtBackend, TrtGraph
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, BundleError, OmniportError, UsageError
from omniport.runtime.speech.kept_blocks import nothing_before
from support.fake_device import VERSION, FakeDriver, FakeRuntime, feeds_of, with_engines


def opened(bundle: Bundle, driver: FakeDriver, version: str = VERSION) -> TrtBackend:
    return TrtBackend(bundle, "tensorrt-rtx", runtime=FakeRuntime(bundle, driver, version), driver=driver)


def test_engines_for_other_machines_are_not_loaded(bundle: Bundle, driver: FakeDriver, tmp_path: Path) -> None:
    line = f"omniport build {bundle.root} --target this --builder tensorrt-rtx"
    with pytest.raises(BackendError, match=rf"no engine for tensorrt-rtx 1\.8\.0 on compute capability 8\.9.*{line}"):
        opened(bundle, driver, "1.8.0")
    other = with_engines(bundle.root, tmp_path / "other", ["thinker"], capability="12.0")
    made = opened(other, driver)
    assert set(made.missing) == {"thinker"}
    with pytest.raises(
        BackendError, match=r"is for tensorrt-rtx 1\.7\.1\.116 on 12\.0.*--target this.*--graphs thinker"
    ):
        made.graph("thinker")
    assert made.graph("talker").spec.name == "talker"
    with pytest.raises(BackendError, match="pip install 'omniport\\[trt\\]'"):
        TrtBackend(bundle, "tensorrt")


def test_a_changed_engine_is_not_loaded(bundle: Bundle, driver: FakeDriver, tmp_path: Path) -> None:
    changed = with_engines(bundle.root, tmp_path / "changed", ["dit"])
    runtime = FakeRuntime(changed, driver)
    made = TrtBackend(changed, "tensorrt-rtx", runtime=runtime, driver=driver)
    path = made.engines["dit"].path
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[::-1])
    with pytest.raises(BundleError, match=r"sha256.*not loaded.*--force"):
        made.graph("dit")
    assert "dit" not in runtime.loaded
    path.unlink()
    with pytest.raises(BackendError, match="no engine of dit"):
        opened(changed, driver).graph("dit")


def test_an_engine_of_another_graph_is_not_run(bundle: Bundle, driver: FakeDriver) -> None:
    runtime = FakeRuntime(bundle, driver)
    made, load = TrtBackend(bundle, "tensorrt-rtx", runtime=runtime, driver=driver), runtime.load

    def wrong(path: Path) -> Any:
        engine: Any = load(path)
        tensors = dict(engine.tensors)
        del tensors["step"]
        engine.tensors = tensors
        return engine

    runtime.load = wrong  # type: ignore[method-assign]
    with pytest.raises(BundleError, match=r"does not have the inputs and outputs of graph 'dit' \(step \(int64\)"):
        made.graph("dit")

    def swapped(path: Path) -> Any:
        engine: Any = load(path)
        engine.aliased_input = lambda output: "past_value_0"
        return engine

    runtime.load = swapped  # type: ignore[method-assign]
    with pytest.raises(BundleError, match=r"writes 'present_key_0' over 'past_value_0'; 'past_key_0' was expected"):
        made.graph("thinker")


def test_shapes_that_an_engine_was_not_built_for(bundle: Bundle, backend: TrtBackend) -> None:
    graph = backend.graph("bigvgan")
    with pytest.raises(BackendError, match=r"'mel' .* is \[1, 80, 1\].*built for \[1, 80, 2\] to .*omniport build"):
        graph.run({"mel": np.zeros((1, 80, 1), np.float32)})
    thinker = backend.graph("thinker")
    with pytest.raises(BackendError, match=r"1025 tokens was asked for.*max_context=1024.*--max-context 1025"):
        thinker.new_cache(1025)
    assert thinker.new_cache(10).capacity == 1024
    with pytest.raises(UsageError, match=r"1 to 1024 tokens were expected.*engines were built for"):
        OmniSession(bundle, backend, max_context=2000)


def test_misuse_is_refused(bundle: Bundle, backend: TrtBackend) -> None:
    dit, thinker = backend.graph("dit"), backend.graph("thinker")
    assert isinstance(dit, TrtGraph)
    with pytest.raises(BackendError, match="keeps no KV cache"):
        dit.new_cache(10)
    with pytest.raises(OmniportError, match="NoneType as its cache"):
        thinker.run(feeds_of(backend, 1))
    with pytest.raises(OmniportError, match="StaticTrtCache as its cache"):
        backend.graph("bigvgan").run({"mel": np.zeros((1, 80, 4), np.float32)}, thinker.new_cache(10))
    with pytest.raises(OmniportError, match=r"got \['mel'\]; it takes"):
        dit.run({"mel": np.zeros(3)})
    with pytest.raises(OmniportError, match="is float64; float32 was expected"):
        backend.graph("bigvgan").run({"mel": np.zeros((1, 80, 4))})
    with pytest.raises(OmniportError, match="adds 30 tokens to a KV cache of 1024"):
        thinker.run(feeds_of(backend, 30, 1000), thinker.new_cache(10))
    with pytest.raises(BackendError, match="has no graph 'vocoder'"):
        backend.graph("vocoder")
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        dit.run({name: np.zeros(1, np.float32) for name in ("x",)} | feeds_of_dit(bundle))
    with pytest.raises(BackendError, match="closed"):
        backend.graph("dit")


def feeds_of_dit(bundle: Bundle) -> dict[str, NDArray[Any]]:
    geometry = bundle.manifest.dit
    assert geometry is not None
    return {
        "x": np.zeros((1, 8, geometry.mel_dim), np.float32),
        "codes": np.zeros((1, 4), np.int64),
        "speaker": np.zeros((1, geometry.speaker_dim), np.float32),
        "reference": np.zeros((1, geometry.reference_dim), np.float32),
        "step": np.zeros(1, np.int64),
        **nothing_before(geometry),
    }
