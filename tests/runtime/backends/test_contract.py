"""The contract of backends: every wrapper keeps all of it, a composite answers for its members, one line adds one."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omniport.calib.report.recorded_calls import _SilentBackend
from omniport.export.evaluation import measure_ranges
from omniport.export.evaluation.half_emulation import EmulatedBackend
from omniport.export.evaluation.recording import RecordingBackend
from omniport.export.validation.checks.speech_runs import SpeechRun, _TappedBackend
from omniport.export.validation.low_memory_backend import LowMemoryBackend
from omniport.runtime import OmniSession, SamplingConfig
from omniport.runtime.backends import BACKENDS, open_backend
from omniport.runtime.backends.base import (
    Array,
    Backend,
    BackendWrapper,
    Graph,
    KvCache,
    Outputs,
    RunHandle,
)
from omniport.runtime.backends.checked import CheckedBackend
from omniport.runtime.backends.composite import CompositeBackend
from omniport.runtime.backends.guarded import GuardedBackend
from omniport.runtime.bench.workloads import _OneGraphBackend
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.cancel import CancelToken
from omniport.runtime.concurrency.pace import Pace
from omniport.runtime.concurrency.timing import StageTimer
from omniport.runtime.errors import BackendError
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from support.bundles import make_bundle, make_manifest
from support.fake_backend import FakeBackend
from support.live_turns import Watch, Watched, sort
from support.paths import REPOSITORY

SPEECH = ("thinker", "talker", "dit", "bigvgan")
TEXT = "the quick brown fox jumps over the lazy dog"


class Handle(RunHandle):
    def stop(self) -> None: ...


class Bare(Graph):
    """Nothing but what a graph has to have; notes the handles of its runs."""

    def __init__(self, handle: RunHandle | None = None) -> None:
        self.own = handle
        self.given: list[RunHandle | None] = []
        self.spec = SimpleNamespace(name="bare")

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        self.given.append(handle)
        return {"ranges": np.zeros(0, np.float32), "wav": np.zeros(1, np.float32)}

    def handle(self) -> RunHandle | None:
        return self.own


class Bounded(Backend):
    """A CPU's backend: one run at a time, of the DiT alone; caches of 77 tokens; runs that can be stopped."""

    name = "bounded"

    def __init__(self) -> None:
        self.only, self.closed = Bare(Handle()), 0
        self.host_nodes = {"dit": (("Loop", "steps"),)}

    def graph(self, name: str) -> Bare:
        return self.only

    def close(self) -> None:
        self.closed += 1

    def at_once(self) -> int | None:
        return 1

    def shares_cores(self, graph: str) -> bool:
        return graph == "dit"

    def max_context(self) -> int | None:
        return 77


class Minimal(Backend):
    name = "minimal"

    def graph(self, name: str) -> Graph:
        return Bare()

    def close(self) -> None: ...


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(make_bundle(tmp_path / "bundle"))


# --- wrappers -----------------------------------------------------------------------------------------------------


def over(make: Callable[[Bundle], BackendWrapper]) -> Callable[[Backend, Bundle], BackendWrapper]:
    """Of a wrapper that opens its own inner backend."""

    def wrap(inner: Backend, bundle: Bundle) -> BackendWrapper:
        made = make(bundle)
        BackendWrapper.__init__(made, inner)
        return made

    return wrap


WRAPPERS: dict[type[BackendWrapper], Callable[[Backend, Bundle], BackendWrapper]] = {
    BackendWrapper: lambda inner, bundle: BackendWrapper(inner),
    CheckedBackend: lambda inner, bundle: CheckedBackend(inner, bundle.manifest.graphs),
    GuardedBackend: lambda inner, bundle: GuardedBackend(inner, CancelToken(), StageTimer()),
    RecordingBackend: lambda inner, bundle: RecordingBackend(inner),
    LowMemoryBackend: lambda inner, bundle: LowMemoryBackend(lambda: inner),
    EmulatedBackend: over(EmulatedBackend),
    measure_ranges._ObservingBackend: over(measure_ranges._ObservingBackend),
    _TappedBackend: lambda inner, bundle: _TappedBackend(inner, SpeechRun()),
    _SilentBackend: lambda inner, bundle: _SilentBackend(inner, bundle.manifest),
    _OneGraphBackend: lambda inner, bundle: _OneGraphBackend(inner, inner.graph("dit")),
}


def subclasses(kind: type) -> set[type]:
    """Those of the product, at any depth."""
    found = {kind}.union(*map(subclasses, kind.__subclasses__()))
    return {each for each in found if each.__module__.startswith("omniport.")}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_keeps_the_contract(
    kind: type[BackendWrapper], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Bounded()
    monkeypatch.setattr(measure_ranges, "_observed", lambda *_: measure_ranges._ObservedGraph(inner.only, ()))
    monkeypatch.setattr(measure_ranges, "_OUTPUT", "ranges")
    wrapper = WRAPPERS[kind](inner, bundle)
    assert type(wrapper) is kind
    assert wrapper.at_once() == 1
    assert [wrapper.shares_cores(name) for name in SPEECH] == [False, False, True, False]
    assert wrapper.max_context() == 77
    assert wrapper.host_nodes == inner.host_nodes
    graph = wrapper.graph("thinker")
    handle = graph.handle()
    assert handle is inner.only.own
    graph.run({}, None, handle)
    assert inner.only.given == [handle]


def test_every_wrapper_is_in_the_table() -> None:
    assert subclasses(BackendWrapper) == WRAPPERS.keys()


@pytest.mark.parametrize(("method", "base"), [("graph", "Backend"), ("new_cache", "Graph")])
def test_whatever_looks_like_a_backend_or_a_graph_derives_from_it(method: str, base: str) -> None:
    """In the product, the benchmarks and the tests: a class that only looks like one answers half of the contract."""
    bases: dict[str, set[str]] = {}
    alike: set[str] = set()
    folders = ("runtime", "export", "calib", "cli", "benchmarks", "scripts", "tests")
    for path in itertools.chain.from_iterable((REPOSITORY / folder).rglob("*.py") for folder in folders):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(each).partition("[")[0] for each in node.bases}
                methods = [f for f in node.body if isinstance(f, ast.FunctionDef)]
                if any(f.name == method and len(f.args.args) == 2 for f in methods):
                    alike.add(node.name)
    derived = {base}
    while more := {name for name, above in bases.items() if above & derived} - derived:
        derived |= more
    assert len(alike) > 5
    assert alike <= derived


def test_what_a_backend_need_not_say() -> None:
    backend = Minimal()
    assert (backend.at_once(), backend.max_context(), backend.shares_cores("dit")) == (None, None, False)
    assert FakeBackend(make_manifest(), room=2).shares_cores("dit")
    assert Bare().handle() is None
    with pytest.raises(BackendError, match="keeps no KV cache"):
        Bare().new_cache(8)
    for kind in (Backend, Graph, RunHandle):
        with pytest.raises(TypeError, match="abstract"):
            kind()


# --- a composite --------------------------------------------------------------------------------------------------


def test_a_composite_answers_for_its_members() -> None:
    engines, others = Minimal(), Bounded()
    assert CompositeBackend(engines, ["dit"], others).host_nodes == others.host_nodes
    for made in (CompositeBackend(engines, ["dit"], others), CompositeBackend(others, ["thinker"], engines)):
        assert made.at_once() == 1
        assert made.max_context() == 77
    assert made.name == "bounded (thinker) + minimal"
    assert made.graph("thinker") is others.only
    assert made.graph("dit") is not others.only
    made.close()
    assert others.closed == 1
    none = CompositeBackend(engines, ["dit"], engines)
    assert (none.at_once(), none.max_context()) == (None, None)


def test_graphs_of_another_device_share_no_cores(bundle: Bundle) -> None:
    gpu, cpu = FakeBackend(bundle.manifest), FakeBackend(bundle.manifest, room=1)
    made = CompositeBackend(gpu, ("thinker", "dit"), cpu)
    assert [made.shares_cores(name) for name in SPEECH] == [False, True, False, True]


@pytest.mark.parametrize(
    ("engines", "room", "delaying"),
    [
        ((), 1, ["thinker", "talker"]),
        (("audio_encoder",), 1, ["thinker", "talker"]),
        (("thinker",), 1, ["talker"]),
        (("thinker", "talker"), 1, []),
        (("dit", "bigvgan"), 1, ["thinker"]),  # the talker waits for it
        (("talker", "dit", "bigvgan"), 1, []),
        ((), 2, []),
        ((), None, []),
    ],
)
def test_who_delays_the_sound(bundle: Bundle, engines: Collection[str], room: int | None, delaying: list[str]) -> None:
    """Those that can be in the way of a graph that is nearer to the sound, on the same cores."""
    made = CompositeBackend(FakeBackend(bundle.manifest), engines, FakeBackend(bundle.manifest, room=room))
    guarded = GuardedBackend(made, CancelToken(), StageTimer())
    assert [name for name in ("thinker", "talker") if guarded.delays_sound(name)] == delaying


def say(bundle: Bundle, engines: Collection[str]) -> Watch:
    """A spoken reply over engines and a CPU with room for one run."""
    watch = Watch()
    gpu, cpu = FakeBackend(bundle.manifest), FakeBackend(bundle.manifest, room=1)
    with OmniSession(bundle, CompositeBackend(gpu, engines, cpu)) as session:
        for backend in (gpu, cpu):
            backend.graphs["thinker"].script = [*session.text_codec.encode(TEXT), bundle.manifest.chat.stop[0]]  # type: ignore[attr-defined]
            backend.graphs["talker"].script = [*(k % 48 for k in range(120)), 52]  # type: ignore[attr-defined]
            for name in SPEECH:
                backend.graphs[name] = Watched(backend.graphs[name], name, watch, seconds=0.0005)
        most = SamplingConfig(max_new_tokens=130)
        done = sort(session.reply([{"role": "user", "content": "hi"}], thinker=most, talker=most))[2]
    assert (done.text, len(done.codec_ids)) == (TEXT, 120)
    return watch


@pytest.mark.usefixtures("slow")
def test_a_reply_keeps_slots_and_pacing_beside_an_engine(bundle: Bundle) -> None:
    """An engine of the encoder changes nothing for the graphs on the CPU: one at a time, the first sound first."""
    watch = say(bundle, ["audio_encoder"])
    assert watch.most == 1
    before = Counter(watch.log[: watch.log.index("bigvgan") + 1])
    assert before == {"thinker": 25, "talker": 25, "dit": 36, "bigvgan": 1}


@pytest.mark.usefixtures("slow")
def test_engines_are_not_held_back_by_graphs_on_the_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "hold", lambda self, made: pytest.fail("held"))
    seen = say(bundle, ["thinker", "talker"]).together
    assert not any({"dit", "bigvgan"} <= set(names) for names in seen), "both are on the CPU, with room for one"
    assert any("dit" in names and len(names) > 1 for names in seen), "the decoders go on beside the DiT"


@pytest.mark.parametrize(
    ("engines", "longer"),
    [((), True), (("thinker", "talker"), True), (("dit",), False), (("bigvgan",), False), (("dit", "bigvgan"), False)],
)
def test_long_windows_are_for_speech_on_the_cpu(bundle: Bundle, engines: Collection[str], longer: bool) -> None:
    """An engine of either graph is built for no more than 84 codes."""
    made = CompositeBackend(FakeBackend(bundle.manifest), engines, FakeBackend(bundle.manifest, room=1))
    noise = NoiseStream(None, np.random.default_rng(0), 80)
    token2wav = Token2Wav(made, bundle, bundle.voice(), noise)
    assert (token2wav._windows.behind is not None) == longer


# --- the registry -------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", "support.toy_backend")


@pytest.mark.usefixtures("registered")
def test_one_line_opens_another_backend(bundle: Bundle) -> None:
    assert open_backend("toy", bundle).name == "fake"
    with pytest.raises(BackendError, match=r"no backend 'tpu'.*tensorrt-rtx, toy"):
        open_backend("tpu", bundle)
    with OmniSession.open(bundle.root, "toy") as session:
        assert session.backend.name == "fake"


def test_one_line_brings_it_to_the_command_line(bundle: Bundle) -> None:
    """`omniport doctor` lists it; `omniport run --backend` takes it and names it where it takes no other."""

    def omniport(*arguments: object) -> tuple[int, str, str]:
        code = (
            "import sys; from omniport.runtime.backends import BACKENDS; BACKENDS['toy'] = 'support.toy_backend'; "
            "from omniport.cli.main import run; run(sys.argv[1:])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests")},
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    rows = {row["name"]: row for row in json.loads(omniport("doctor", "--json")[1])["backends"]}
    assert rows["toy"] == {"name": "toy", "can_run": True, "why_not": None}
    asked = ("run", bundle.root, "--text", "hi", "--json", "--greedy", "--max-new-tokens", "3")
    code, out, err = omniport(*asked, "--backend", "toy")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["stats"]["backend"] == "fake"
    code, _, err = omniport(*asked, "--backend", "tpu")
    assert code == 2
    assert "'toy'" in err
