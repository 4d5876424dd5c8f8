"""The OpenVINO backend: the same reply as ONNX Runtime, what it keeps, and what it leaves to ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omniport.export.validation.context import judged_as
from omniport.runtime import AudioChunk, Done, OmniSession, SamplingConfig
from omniport.runtime.backends import open_backend
from omniport.runtime.backends.openvino.backend import OpenVinoBackend, OpenVinoGraph, OpenVinoRun
from omniport.runtime.backends.openvino.packages import import_openvino
from omniport.runtime.bench.benchmark import bench
from omniport.runtime.bench.workloads import Sizes
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BackendError, UsageError
from omniport.runtime.speech.kept_blocks import nothing_before
from onnx import helper
from support.cached_decoder import bundle_with, decoder_model, feed, rows
from support.onnx_graphs import make_model
from support.paths import REPOSITORY

pytest.importorskip("openvino", reason="openvino is not installed: it is published for some machines only")

QUESTION = [{"role": "user", "content": [{"type": "audio", "audio": np.sin(np.arange(24000) / 9).astype(np.float32)}]}]


def answer(bundle: Path, backend: str) -> tuple[Done, np.ndarray]:
    """A spoken reply to a sound of 1.5 s, greedily."""
    text = SamplingConfig(max_new_tokens=6, temperature=0.0)
    codes = SamplingConfig(max_new_tokens=12, temperature=0.0)
    with OmniSession.open(bundle, backend=backend, threads=1) as session:
        events = list(session.reply(QUESTION, thinker=text, talker=codes))
        assert session.backend.name == backend
    done = events[-1]
    assert isinstance(done, Done)
    return done, np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)])


def test_a_spoken_reply_as_in_onnxruntime(tiny_bundle: Path) -> None:
    (ours, sound), (theirs, expected) = (answer(tiny_bundle, name) for name in ("openvino", "ort-cpu"))
    assert ours.token_ids == theirs.token_ids
    assert ours.codec_ids == theirs.codec_ids
    np.testing.assert_allclose(sound, expected, atol=1e-4)
    assert np.abs(expected).max() > 1e-2


def test_a_run_that_is_stopped_gives_nothing_and_ends_whole() -> None:
    """One that runs comes to its end first, and one that has yet to begin does not begin."""
    begun: list[str] = []

    class Request:
        def start_async(self) -> None:
            begun.append("start")

        def wait(self) -> None:
            run.stop()
            begun.append("end")

    run = OpenVinoRun()
    for seen in (["start", "end"], ["start", "end"]):
        with pytest.raises(RuntimeError, match="stopped"):
            run.run(Request())
        assert begun == seen


@pytest.mark.slow
def test_runs_behind_stopped_ones_are_right(wren_bundle: Path) -> None:
    """A request of OpenVINO 2026.4.1 that is cancelled leaves shapes of its own in the graph: runs behind it fail."""
    bundle, rng = Bundle.open(wren_bundle), np.random.default_rng(0)
    dit = bundle.manifest.dit
    assert dit is not None

    def feeds(codes: int) -> dict[str, np.ndarray]:
        return {
            "codes": rng.integers(0, dit.num_embeds, (1, codes)),
            "x": rng.standard_normal((1, dit.repeats * codes, dit.mel_dim), np.float32),
            "step": np.asarray([3], np.int64),
            **bundle.voice().feeds(),
            **nothing_before(dit),
        }

    graph = OpenVinoBackend(bundle, threads=1).graph("dit")
    known = [feeds(codes) for codes in (24, 36, 60, 84)]
    expected = [graph.run(given)["velocity"] for given in known]
    started = time.perf_counter()
    graph.run(known[-1])
    seconds, stopped = time.perf_counter() - started, 0
    for _ in range(60):
        handle = graph.handle()
        timer = threading.Timer(float(rng.uniform(0, seconds)), handle.stop)
        timer.start()
        with suppress(BackendError):
            graph.run(known[int(rng.integers(len(known)))], handle=handle)
            stopped -= 1
        stopped += 1
        timer.join()
        which = int(rng.integers(len(known)))
        np.testing.assert_allclose(graph.run(known[which])["velocity"], expected[which], atol=1e-5)
    assert stopped > 10
    assert np.abs(expected[0]).max() > 0.1


def test_what_it_cannot_load_runs_in_onnxruntime(tmp_path: Path) -> None:
    model = decoder_model()
    scatter = next(node for node in model.graph.node if node.op_type == "TensorScatter")
    next(a for a in scatter.attribute if a.name == "mode").s = b"circular"
    backend = open_backend("openvino", bundle_with(tmp_path / "b", model))
    with pytest.warns(
        RuntimeWarning, match=r"ONNX Runtime runs graph 'thinker': OpenVINO .* cannot load .*TensorScatter"
    ):
        graph = backend.graph("thinker")
    assert not isinstance(graph, OpenVinoGraph)
    assert np.isfinite(graph.run(feed(rows(2), 0), graph.new_cache(8))["logits"]).all()


def test_what_neither_loads(tmp_path: Path) -> None:
    made = decoder_model()
    broken = make_model([helper.make_node("Sqrt", ["inputs_embeds"], ["logits"])], (), ())
    made.graph.CopyFrom(broken.graph)
    with pytest.raises(BackendError, match=r"cannot load graph 'thinker'.*inputs_embeds.*Nor can ONNX Runtime"):
        open_backend("openvino", bundle_with(tmp_path / "b", made)).graph("thinker")


def test_a_full_cache_says_so(tmp_path: Path) -> None:
    graph = open_backend("openvino", bundle_with(tmp_path / "b")).graph("thinker")
    cache = graph.new_cache(4)
    graph.run(feed(rows(4), 0), cache)
    held = cache.nbytes
    assert held > 0
    with pytest.raises(BackendError, match="holds 4 tokens, and 5 were given"):
        graph.run(feed(rows(1), 4), cache)
    assert cache.nbytes == held


def test_threads_and_exactness_are_given_to_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniport.runtime.system.host.physical_cores", lambda: 8)
    bundle = bundle_with(tmp_path / "b")
    spec = bundle.manifest.graphs["thinker"]
    for threads, runs in ((None, 1), (4, 2), (16, 1)):
        backend = OpenVinoBackend(bundle, threads)
        options: dict[str, Any] = backend._options(spec)
        assert (backend.at_once(), options["NUM_STREAMS"]) == (runs, runs)
        assert options["INFERENCE_NUM_THREADS"] == runs * (threads or 8)
        assert options["INFERENCE_PRECISION_HINT"] == "f32"


def test_bfloat16_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has it; other backends compute as the graphs say, and tell so."""
    bundle = bundle_with(tmp_path / "b")
    spec = bundle.manifest.graphs["thinker"]
    monkeypatch.setattr(OpenVinoBackend, "_computes_bfloat16", lambda self: True)
    backend = open_backend("openvino", bundle, compute="bf16")
    assert backend.name == "openvino (bfloat16)"
    assert isinstance(backend, OpenVinoBackend)
    assert backend._options(spec)["INFERENCE_PRECISION_HINT"] == "bf16"
    monkeypatch.setattr(OpenVinoBackend, "_computes_bfloat16", lambda self: False)
    with pytest.raises(BackendError, match="does not compute in bfloat16"):
        open_backend("openvino", bundle, compute="bf16")
    with pytest.raises(UsageError, match="'ort-cpu' computes as the bundle's graphs say"):
        open_backend("ort-cpu", bundle, compute="bf16")
    with pytest.raises(UsageError, match="compute is 'int3'"):
        open_backend("openvino", bundle, compute="int3")


def test_what_is_computed_in_bfloat16_is_judged_so() -> None:
    assert judged_as("float32", "bf16") == "bfloat16"
    assert judged_as("float32", None) == "float32"
    assert judged_as("int8", "bf16") == "int8"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'omniport\[openvino\]'"):
        import_openvino()


def test_the_benchmark_measures_it(tiny_bundle: Path) -> None:
    report = bench(tiny_bundle, ["dit"], sizes=Sizes(codes=(13,)), rounds=1, threads=1, backend="openvino")
    assert report.backend == "openvino"
    (figure,) = report.stages["dit"].figures
    assert figure.seconds.low > 0


GONE_ELSEWHERE = """
import gc, signal, sys, threading
from omniport.runtime.backends.registry import open_backend
from omniport.runtime.bundle.reader import Bundle
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
backend = open_backend("openvino", Bundle.open(sys.argv[1]))
backend.graph("bigvgan")
held = [backend]
del backend

def drop():
    held.pop().close()
    gc.collect()

thread = threading.Thread(target=drop)
thread.start()
thread.join()
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' signal stacks")
def test_a_signal_after_openvino_was_dropped_in_another_thread(tiny_bundle: Path) -> None:
    """Its plugin leaves the thread that loaded it a signal stack, and frees it in the thread that drops it."""
    done = subprocess.run([sys.executable, "-c", GONE_ELSEWHERE, tiny_bundle], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_a_second_session_says_the_same(wren_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's own cache of compiled graphs gave NaN, other answers and other sound when it was read back."""
    monkeypatch.setenv("OMNIPORT_CACHE", str(tmp_path / "cache"))
    asked = REPOSITORY / "wren" / "questions"
    parts = [{"type": "image", "image": asked / "demo.png"}, {"type": "audio", "audio": asked / "demo.flac"}]
    text, codes = (SamplingConfig(max_new_tokens=count, temperature=0.0) for count in (16, 120))
    sounds = []
    for backend in ("ort-cpu", "openvino", "openvino"):
        with OmniSession.open(wren_bundle, backend=backend, threads=1) as session:
            messages = [{"role": "user", "content": parts}]
            events = list(session.reply(messages, thinker=text, talker=codes, window="whole", seed=0))
        assert isinstance(events[-1], Done)
        assert events[-1].text == "A red triangle and a blue square."
        sounds.append(np.concatenate([event.samples for event in events if isinstance(event, AudioChunk)]))
    assert np.abs(sounds[0]).max() > 0.05
    for sound in sounds[1:]:
        np.testing.assert_allclose(sound, sounds[0], atol=2e-3)
