"""Calibrating a whole checkpoint: it sees what inference sees, can be repeated and resumed, refuses bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from msgspec.structs import replace
from omniport.calib.calibration import calibrate_parts as stages_module
from omniport.calib.calibration import layer_runner as engine_module
from omniport.calib.calibration.dataset import read_samples
from omniport.calib.calibration.observers import BINS
from omniport.calib.calibration.sample_data import write_samples
from omniport.calib.calibration.sites import find_sites
from omniport.calib.calibration_file import ARRAYS, CLIPS, Calibration
from omniport.calib.calibrator import calibrate
from omniport.calib.weights.tensors import find_weights
from omniport.cli.main import run
from omniport.export.evaluation.half_emulation import load_copy, open_graph
from omniport.export.exporter import export_checkpoint
from omniport.runtime.backends.base import Array, Backend, GraphWrapper, KvCache, Outputs, RunHandle
from omniport.runtime.bundle.graph_spec import TensorSpec
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.concurrency.timing import StageTimer
from omniport.runtime.errors import UsageError
from omniport.runtime.generation.decoder import Decoder
from omniport.runtime.generation.encoders import Encoders
from omniport.runtime.generation.talker import Talker
from omniport.runtime.prompt.builder import build_prompt
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from support.checkpoints import rewritten

MAX_CODES = 26
SPEECH = {"max_codes": MAX_CODES, "seed": 3}


def command(*arguments: object) -> int:
    """The exit code of ``omniport calibrate``."""
    with pytest.raises(SystemExit) as exit_:
        run(["calibrate", *map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture(scope="module", autouse=True)
def groups_of_one() -> Iterator[None]:
    """One sample in a group, so that the DiT can be interrupted between two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "_GROUP", 1)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples that reach every part: a spoken question and a picture, and text alone."""
    path = write_samples(tmp_path_factory.mktemp("data") / "set")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    mixed = next(e for e in entries if {p["type"] for p in e["messages"][0]["content"]} == {"audio", "image"})
    text = next(e for e in entries if e["reply"].startswith("def"))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (mixed, text)))
    return path


@pytest.fixture(scope="module")
def bundle(tiny_outlier_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export_checkpoint(tiny_outlier_checkpoint, out, max_context=4096)
    return Bundle.open(out)


@pytest.fixture(scope="module")
def steps() -> dict[str, list[int]]:
    """What the run behind ``calibrated`` asked of the DiT: every ``step``, and the frames of every call."""
    return {"step": [], "frames": []}


@pytest.fixture(scope="module")
def calibrated(
    tiny_outlier_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, steps: dict[str, list[int]]
) -> Path:
    """Interrupted in the thinker, in the DiT and in the vocoder, and resumed each time."""
    out = tmp_path_factory.mktemp("calibrated") / "tiny.calib"
    execute = stages_module._execute

    def record(source: Any, engine: Any, graph: str, requests: Sequence[Any]) -> Any:
        if graph == "dit":
            steps["step"] += [int(request.feeds["step"][0]) for request in requests]
            steps["frames"] += [request.feeds["x"].shape[1] for request in requests]
        return execute(source, engine, graph, requests)

    for moment in (("thinker", 2), ("dit", 1), ("bigvgan", 1), None):
        seen: list[tuple[str, int]] = []

        def stop(stage: str, done: int, _: int, moment: Any = moment, seen: Any = seen) -> None:
            seen.append((stage, done))
            if (stage, done) == moment:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages_module, "_execute", record)
            if moment is not None:
                with pytest.raises(KeyboardInterrupt):
                    calibrate(tiny_outlier_checkpoint, data, out, progress=stop, **SPEECH)
                assert not out.exists()
                continue
            report = calibrate(tiny_outlier_checkpoint, data, out, progress=stop, **SPEECH)
        assert report.resumed
        assert not report.missing
        assert "thinker" not in {stage for stage, _ in seen}, "finished stages were run again"
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out


def test_interrupted_and_whole_runs_give_the_same_bytes(
    calibrated: Path, tiny_outlier_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    report = calibrate(tiny_outlier_checkpoint, data, tmp_path / "again.calib", **SPEECH)
    assert not report.resumed
    assert (tmp_path / "again.calib").read_bytes() == calibrated.read_bytes()


def test_parts_behind_the_last_one_wanted_are_not_run(
    calibrated: Path, tiny_outlier_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    seen: list[str] = []
    report = calibrate(
        tiny_outlier_checkpoint,
        data,
        tmp_path / "part.calib",
        graphs=["talker"],
        progress=lambda stage, *_: seen.append(stage),
        **SPEECH,
    )
    assert not report.missing
    assert {"thinker", "talker"} <= set(seen)
    assert not {"dit", "bigvgan"} & set(seen)
    found, whole = Calibration.load(tmp_path / "part.calib"), Calibration.load(calibrated)
    assert list(found.graphs) == ["talker"]
    assert found.header.graphs["talker"] == whole.header.graphs["talker"]
    for one, other in zip(found.graphs["talker"], whole.graphs["talker"], strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        for name, values in one.arrays.items():
            np.testing.assert_array_equal(values, other.arrays[name])


def test_the_thinker_alone_needs_no_reply(tiny_outlier_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    report = calibrate(tiny_outlier_checkpoint, path, tmp_path / "x.calib", graphs=["thinker"])
    assert list(report.calibration.graphs) == ["thinker"]


@pytest.mark.parametrize(("graphs", "message"), [(["dit", "brain"], "no graph brain: .*bigvgan"), ([], "is named")])
def test_a_graph_that_is_not_there_is_refused(
    tiny_outlier_checkpoint: Path, data: Path, tmp_path: Path, graphs: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(tiny_outlier_checkpoint, data, tmp_path / "x.calib", graphs=graphs)
    assert not list(tmp_path.iterdir())


def test_what_is_drawn_for_a_sample_depends_on_it_alone(data: Path, bundle: Bundle, tmp_path: Path) -> None:
    """With observers that know no order (tests/calib/calibration/test_calibration_parts.py), ranges do not depend on
    that of the samples."""
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    turned = data.with_name("turned.jsonl")
    turned.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    first, second = (read_samples(path, bundle.manifest, codec) for path in (data, turned))
    assert [sample.digest for sample in first] == [sample.digest for sample in reversed(second)]
    assert len({sample.digest for sample in first}) == 2
    (data.parent / "copy.png").write_bytes((data.parent / "tall.png").read_bytes())
    turned.write_text(data.read_text().replace("tall.png", "copy.png"))
    assert read_samples(turned, bundle.manifest, codec)[0].digest == first[0].digest
    (data.parent / "copy.png").write_bytes((data.parent / "wide.png").read_bytes())
    assert read_samples(turned, bundle.manifest, codec)[0].digest != first[0].digest


def test_sites_are_the_weights_of_the_exported_graphs(calibrated: Path, bundle: Bundle) -> None:
    calibration = Calibration.load(calibrated)
    assert calibration.header.fingerprint == bundle.manifest.source.fingerprint
    assert set(calibration.graphs) == set(bundle.manifest.graphs)
    for graph, sites in calibration.graphs.items():
        model = ir.load(bundle.path(f"graphs/{graph}.onnx"))
        listed = [name for site in sites if not site.record.output for name in site.record.weights]
        assert sorted(listed) == sorted(weight.name for weight in find_weights(model))
        assert [(site.record.weights, site.record.output) for site in sites] == [
            (tuple(weight.name for weight in site.weights), site.output) for site in find_sites(graph, model)
        ]
        whole = [n for n in model.graph if n.op_type == "Conv" and n.attributes.get_int("group", 1) == 1]
        given = [site.record.weights[0] for site in sites if site.record.output]
        assert sorted(given) == sorted({str(n.inputs[1].name) for n in whole if n.inputs[1]} & set(listed))
        assert len(given) == {"audio_encoder": 2, "bigvgan": 67}.get(graph, 0)
    thinker = {site.name: site.record.weights for site in calibration.graphs["thinker"]}
    attention = "model.layers.1.self_attn."
    assert thinker[f"{attention}q_proj.weight"] == tuple(f"{attention}{part}_proj.weight" for part in "qkv")


def test_arrays_hold_together(calibrated: Path) -> None:
    for graph, sites in Calibration.load(calibrated).graphs.items():
        for site in sites:
            arrays, record = site.arrays, site.record
            top, channels = arrays["absmax"].max(), len(arrays["absmax"])
            assert set(arrays) <= set(ARRAYS)
            assert set(record.clips) == set(CLIPS)
            assert arrays["hist"].shape == (BINS,)
            assert arrays["hist"].sum() == record.count > 0
            assert record.clips["max"] == top
            assert all(0 < clip <= top for clip in record.clips.values())
            factors = {name for name in arrays if name not in ("absmax", "hist")}
            blocks = {f"awq-{n}" for n in (32, 128) if channels % n == 0} if graph in ("thinker", "talker") else set()
            assert factors == ({"smooth"} | blocks if record.kind == "matmul" else set())
            for name in factors:
                assert arrays[name].shape == (channels,)
                assert np.isfinite(arrays[name]).all()
                assert (arrays[name] > 0).all()


def test_smoothing_evens_out_the_planted_channels(calibrated: Path) -> None:
    site = Calibration.load(calibrated).site("thinker", "model.layers.1.self_attn.q_proj.weight")
    assert site is not None
    before = site.arrays["absmax"]
    after = before / site.arrays["smooth"]
    assert before.max() / np.median(before) > 20, "the checkpoint has no outliers to smooth"
    assert after.max() / np.median(after) < 0.4 * before.max() / np.median(before)


def test_the_dit_is_seen_at_every_step_and_in_both_halves(
    calibrated: Path, steps: dict[str, list[int]], bundle: Bundle
) -> None:
    solver = bundle.manifest.solver
    assert solver is not None
    assert set(steps["step"]) == {index for stage in solver.stages for index in stage} == set(range(28))
    site = Calibration.load(calibrated).site("dit", "input_embed.proj.weight")
    assert site is not None
    # with the voice and without: two rows for every frame
    assert site.record.count == 2 * sum(steps["frames"]) * len(site.arrays["absmax"])


class Observed(Backend):
    """ONNX Runtime over graphs that also give the largest magnitude of each channel that their products read."""

    name = "observed"

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.graphs: dict[str, ObservedGraph] = {}

    def graph(self, name: str) -> ObservedGraph:
        if name not in self.graphs:
            self.graphs[name] = ObservedGraph(self.bundle, name)
        return self.graphs[name]

    def close(self) -> None:
        pass


class ObservedGraph(GraphWrapper):
    def __init__(self, bundle: Bundle, name: str) -> None:
        spec = bundle.manifest.graphs[name]
        path = bundle.path(spec.file)
        model, spec = load_copy(path, spec, emulate=False)
        self.tops: dict[str, np.ndarray[Any, Any]] = {}
        read = {
            node.inputs[1].name: node for node in model.graph if len(node.inputs) > 1 and node.inputs[1] is not None
        }
        outputs = []
        for i, site in enumerate(find_sites(name, model)):
            node = read[site.weights[0].name]
            value = node.outputs[0] if site.output else node.inputs[0]
            assert value is not None
            size = ir.node("Abs", [value])
            # ranks are not in the graph: channels to the front, the rest flat
            rank = len(site.weights[0].shape) if site.kind == "conv" or value.shape is None else len(value.shape)
            axis = 1 if site.kind == "conv" else rank - 1
            turned = ir.node("Transpose", [size.outputs[0]], {"perm": [axis, *(a for a in range(rank) if a != axis)]})
            flat = ir.node("Flatten", [turned.outputs[0]], {"axis": 1})
            rows = ir.node("Transpose", [flat.outputs[0]], {"perm": [1, 0]})
            one = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))})
            top = ir.node("ReduceMax", [rows.outputs[0], one.outputs[0]], {"keepdims": 0}, name=f"top{i}")
            model.graph.extend([size, turned, flat, rows, one, top])
            out = top.outputs[0]
            out.name, out.dtype, out.shape = f"top/{site.name}", ir.DataType.FLOAT, ir.Shape(["k"])
            model.graph.outputs.append(out)
            outputs.append(TensorSpec(out.name, "float32", ("k",)))
        super().__init__(open_graph(model, replace(spec, outputs=(*spec.outputs, *outputs)), path.parent, 1))

    def run(self, feeds: Mapping[str, Array], cache: KvCache | None = None, handle: RunHandle | None = None) -> Outputs:
        outputs = super().run(feeds, cache, handle)
        for name in [name for name in outputs if name.startswith("top/")]:
            top = outputs.pop(name)
            self.tops[name[4:]] = np.maximum(self.tops.get(name[4:], top), top)
        return outputs


def answer(bundle: Bundle, backend: Observed, sample: Any) -> list[int]:
    """What the runtime does when the thinker says a sample's reply; gives the codes."""
    manifest, timer = bundle.manifest, StageTimer()
    codec = TextCodec.from_file(bundle.path(manifest.tokenizer_file), manifest.tokens)
    prompt = build_prompt(sample.messages, manifest, codec)
    table = bundle.embedding("thinker")
    embeds = table.rows(prompt.token_ids)
    for span in prompt.media:
        embeds[span.indices] = Encoders(backend, timer).embed(span)
    thinker = Decoder(backend.graph("thinker"), backend.graph("thinker").new_cache(4096))
    _, hidden = thinker.forward(embeds, prompt.position_ids)
    assert hidden is not None
    embeds[prompt.media_mask] = 0
    rows = []
    for k, token in enumerate(sample.reply):
        row = table.rows([token])
        _, state = thinker.forward(row, np.full((3, 1), prompt.next_position + k))
        assert state is not None
        rows.append(state[0] + row[0])
    draws = np.random.SeedSequence([SPEECH["seed"], int(sample.digest, 16)]).spawn(3)
    voice = manifest.voices[int(sample.digest, 16) % len(manifest.voices)]
    talker, decoder = Talker(bundle), Decoder(backend.graph("talker"), backend.graph("talker").new_cache(4096))
    decoder.forward(hidden + embeds, prompt.position_ids)
    assert manifest.talker_sampling is not None
    assert manifest.dit is not None
    sampler = talker.sampler(
        replace(manifest.talker_sampling, max_new_tokens=MAX_CODES), np.random.default_rng(draws[1])
    )
    highest = int(prompt.position_ids.max())
    tail = prompt.next_position
    codes = list(talker.codes(decoder, iter(rows), voice, sampler, timer, tail=tail, highest=highest))
    noise = NoiseStream(None, np.random.default_rng(draws[2]), manifest.dit.mel_dim)
    speech = Token2Wav(backend, bundle, bundle.voice(voice.name), noise, timer=timer)
    waves = [wave for code in codes for wave in speech.push(code)] + speech.finish()
    assert np.sqrt(np.mean(np.concatenate(waves) ** 2)) > 1e-3
    return codes


@pytest.fixture(scope="module")
def observed(bundle: Bundle, data: Path) -> Observed:
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    backend = Observed(bundle)
    for sample in read_samples(data, bundle.manifest, codec):
        assert len(answer(bundle, backend, sample)) > 12
    return backend


def test_calibration_sees_what_the_exported_graphs_see(calibrated: Path, observed: Observed) -> None:
    worst: dict[str, float] = {}
    for graph, sites in Calibration.load(calibrated).graphs.items():
        for site in sites:
            wanted, found = observed.graphs[graph].tops[site.name], site.arrays["absmax"]
            assert wanted.max() > 1e-3
            worst[f"{graph}/{site.name}"] = float(np.abs(found - wanted).max() / wanted.max())
    assert len(worst) > 260
    # single precision: the talker's and the DiT's loops feed on what they gave before
    assert max(worst.values()) < 3e-5, max(worst, key=lambda name: worst[name])


def test_one_layer_of_weights_is_in_memory(
    tiny_outlier_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, int] = {}
    total: dict[str, int] = {}
    run_layer = engine_module.LayerRunner.run_layer

    def watch(self: Any, index: int, keep_caches: bool = True) -> None:
        release = self._lazy.release
        monkeypatch.setattr(self._lazy, "release", lambda: (note(self), release()))
        run_layer(self, index, keep_caches)
        monkeypatch.setattr(self._lazy, "release", release)

    def note(self: Any) -> None:
        held[self.name] = max(held.get(self.name, 0), self._lazy.held_bytes)
        total[self.name] = sum(t.numel() * 4 for t in self.module.parameters())

    monkeypatch.setattr(engine_module.LayerRunner, "run_layer", watch)

    class Enough(Exception):
        pass

    def stop(stage: str, *_: int) -> None:
        if stage.endswith("talker"):
            raise Enough

    with pytest.raises(Enough):
        calibrate(tiny_outlier_checkpoint, data, tmp_path / "x.calib", progress=stop, **SPEECH)
    assert set(held) == {"audio_encoder", "vision_encoder", "thinker"}
    for name, most in held.items():
        assert 0 < most < 0.5 * total[name], name


# what is refused


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            {"model.layers.1.mlp.down_proj": 1e38, "model.layers.1.mlp.up_proj": 1e10},
            "thinker/model.layers.2.self_attn.q_proj.weight: its input is not finite",
        ),
        ({"audio_tower.conv2": 3e38}, "audio_encoder/conv2.weight: its output is not finite"),
    ],
)
def test_a_value_that_is_not_finite_names_the_layer(
    factors: dict[str, float],
    message: str,
    tiny_outlier_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def explode(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in factors.items():
            tensors[f"thinker.{name}.weight"] *= factor

    broken = rewritten(tiny_outlier_checkpoint, tmp_path / "broken", explode)
    out = tmp_path / "x.calib"
    assert command(broken, out, "--data", data, "-q") == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ('{"messages": [], "extra": 1}', "expected"),
        ('{"messages": [{"role": "user", "content": "Hi"}], "reply": ""}', "a text that is not empty"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}', "no.png"),
        ('{"messages": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]}', "type 'smell'"),
    ],
)
def test_a_bad_sample_is_an_error_that_names_its_line(
    line: str, message: str, tiny_outlier_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}], "reply": "Hello"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=r"calib\.jsonl:3: ") as caught:
        calibrate(tiny_outlier_checkpoint, path, tmp_path / "x.calib")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["calib.jsonl"]


def test_speech_needs_a_reply(tiny_outlier_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "calib.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(UsageError, match=r'no sample of .* has a "reply"'):
        calibrate(tiny_outlier_checkpoint, path, tmp_path / "x.calib")


def test_another_checkpoint_is_refused(calibrated: Path) -> None:
    calibration = Calibration.load(calibrated)
    calibration.check(calibration.header.fingerprint, "the bundle")
    with pytest.raises(UsageError, match="another checkpoint"):
        calibration.check("f" * 64, "the bundle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "CHECKPOINT, OUT.calib and --data"),
        (("CKPT", "OUT"), "CHECKPOINT, OUT.calib and --data"),
        (("CKPT", "OUT", "--data", "nothing.jsonl"), "nothing.jsonl is not a file"),
        (("CKPT", "no/folder/x.calib", "--data", "DATA"), "is not a folder"),
        (("CKPT", ".", "--data", "DATA"), "is a folder"),
        (("CKPT", "--sample-data", "OUT"), "give it alone"),
    ],
)
def test_usage_errors(
    arguments: Sequence[str],
    message: str,
    tiny_outlier_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"CKPT": str(tiny_outlier_checkpoint), "OUT": str(tmp_path / "x.calib"), "DATA": str(data)}
    assert command(*(known.get(argument, argument) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# the ready set


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("ready") / "set").parent


def test_the_ready_set_is_small_and_the_same_every_time(
    ready: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--sample-data", tmp_path / "set", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    files = sorted(path.name for path in ready.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "set").iterdir())
    for name in files:
        assert (ready / name).read_bytes() == (tmp_path / "set" / name).read_bytes()
    assert facts["bytes"] < 400_000
    assert command("--sample-data", tmp_path / "set") == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_the_ready_set_reaches_every_part(ready: Path, bundle: Bundle) -> None:
    codec = TextCodec.from_file(bundle.path(bundle.manifest.tokenizer_file), bundle.manifest.tokens)
    samples = read_samples(ready / "calib.jsonl", bundle.manifest, codec)
    assert all(sample.reply for sample in samples)
    kinds = {span.kind for sample in samples for span in sample.prompt(bundle.manifest, codec).media}
    assert kinds == {"audio", "image", "video"}
    assert len(read_samples(ready / "calib.jsonl", bundle.manifest, codec, 2)) == 2
