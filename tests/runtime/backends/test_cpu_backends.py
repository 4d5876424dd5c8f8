"""What every backend on the CPU does with a decoder: caches are apart, can be cut back, and survive a stopped run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.base import Graph
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, OmniportError
from support.cached_decoder import CAPACITY, bundle_with, decoder_spec, feed, rows


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_with(tmp_path / "b")


@pytest.fixture(params=["ort-cpu", "openvino"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: it is published for some machines only")
    name: str = request.param
    return name


@pytest.fixture
def graph(bundle: Bundle, backend: str) -> Graph:
    return open_backend(backend, bundle).graph("thinker")


def test_a_stopped_run_leaves_the_cache_as_it_was(graph: Graph) -> None:
    stopped, whole = graph.new_cache(CAPACITY), graph.new_cache(CAPACITY)
    for cache in (stopped, whole):
        graph.run(feed(rows(5), 0), cache)
    handle = graph.handle()
    assert handle is not None
    handle.stop()
    with pytest.raises(BackendError, match="could not run graph 'thinker'"):
        graph.run(feed(rows(3, seed=2), 5), stopped, handle)
    again, expected = (graph.run(feed(rows(3, seed=3), 5), cache)["logits"] for cache in (stopped, whole))
    np.testing.assert_array_equal(again, expected)


def test_a_cache_can_be_cut_back(graph: Graph) -> None:
    """To where it was before a reply that was interrupted; what follows is as if that had never been."""
    cut, straight = graph.new_cache(CAPACITY), graph.new_cache(CAPACITY)
    for cache in (cut, straight):
        graph.run(feed(rows(4), 0), cache)
    graph.run(feed(rows(6, seed=2), 4), cut)
    for seed, start in ((3, 4), (4, 6)):
        got, expected = (graph.run(feed(rows(2, seed=seed), start), cache)["logits"] for cache in (cut, straight))
        np.testing.assert_array_equal(got, expected)


def test_two_caches_are_apart_and_a_used_one_starts_anew(graph: Graph) -> None:
    first, second = graph.new_cache(CAPACITY), graph.new_cache(8)
    a = graph.run(feed(rows(6), 0), first)["logits"]
    b = graph.run(feed(rows(6, seed=2), 0), second)["logits"]
    assert np.abs(a - b).max() > 0.1
    np.testing.assert_array_equal(graph.run(feed(rows(6, seed=2), 0), first)["logits"], b)
    kept = a.copy()
    graph.run(feed(rows(6, seed=3), 0), first)
    np.testing.assert_array_equal(a, kept)


def test_feeds_are_checked(graph: Graph) -> None:
    cache, good = graph.new_cache(CAPACITY), feed(rows(2), 0)
    with pytest.raises(OmniportError, match="as its cache"):
        graph.run(good)
    with pytest.raises(OmniportError, match="it takes"):
        graph.run({k: v for k, v in good.items() if k != "write_index"}, cache)
    with pytest.raises(OmniportError, match="is float64; float32 was expected"):
        graph.run({**good, "inputs_embeds": good["inputs_embeds"].astype(np.float64)}, cache)
    with pytest.raises(BackendError, match="could not run graph 'thinker'"):
        graph.run({**good, "inputs_embeds": np.zeros((1, 2, 7), np.float32)}, cache)
    assert np.isfinite(graph.run(good, cache)["logits"]).all()


@pytest.mark.filterwarnings("ignore:ONNX Runtime runs graph:RuntimeWarning")  # OpenVINO leaves it, as it keeps nothing
def test_only_decoders_have_a_cache(tmp_path: Path, backend: str) -> None:
    bundle = bundle_with(tmp_path / "b", spec=decoder_spec(aliased=False))
    graph = open_backend(backend, bundle).graph("thinker")
    with pytest.raises(BackendError, match="keeps no KV cache"):
        graph.new_cache(4)


def test_a_closed_backend_says_so(bundle: Bundle, backend: str) -> None:
    opened = open_backend(backend, bundle, threads=1)
    assert opened.graph("thinker") is opened.graph("thinker")
    opened.close()
    with pytest.raises(BackendError, match="closed"):
        opened.graph("thinker")
