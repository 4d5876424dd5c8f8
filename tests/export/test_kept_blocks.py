"""Windows that take over the DiT's keys and values from the window before, against the whole utterance."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from omniport.runtime.backends.onnxruntime.backend import OrtBackend
from omniport.runtime.bundle.manifest import DitGeometry
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import BundleError
from omniport.runtime.speech.kept_blocks import KeptBlocks, kept_bytes, nothing_before
from omniport.runtime.speech.token2wav import NoiseStream, Token2Wav
from omniport.runtime.speech.windows import SpeechWindows, Window
from support.bundles import edit, write_manifest

Floats = NDArray[np.float32]
CODES = 96
#: of the mel's own scale, in float32: other sums of some hundred terms, at 36 evaluations
EXACT = 1e-5


class Speech:
    """An utterance of a bundle."""

    def __init__(self, root: Path) -> None:
        self.bundle = Bundle.open(root)
        self.backend = OrtBackend(self.bundle, threads=1)
        rng = np.random.default_rng(0)
        self.codes = rng.integers(0, self.dit.num_embeds, CODES)
        self.noise = rng.standard_normal((CODES * self.dit.repeats, self.dit.mel_dim), np.float32)

    @property
    def dit(self) -> DitGeometry:
        assert self.bundle.manifest.dit is not None
        return self.bundle.manifest.dit

    def mel(self, window: Window, **changes: Any) -> Floats:
        """[frames, 80], with some fields of the DiT's geometry changed."""
        bundle = copy.copy(self.bundle)
        dit = msgspec.structs.replace(self.dit, **changes)
        bundle.manifest = msgspec.structs.replace(bundle.manifest, dit=dit)
        noise = NoiseStream(self.noise, np.random.default_rng(0), dit.mel_dim)
        made = Token2Wav(self.backend, bundle, bundle.voice(), noise, window=window)
        pieces = [piece for code in self.codes for piece in made.mels(int(code))] + made.last_mels()
        return np.concatenate([piece.mel[piece.skip : piece.skip + piece.count] for piece in pieces])

    def velocity(self, borders: list[int], step: int = 3) -> Floats:
        """At one time point, [frames, 80], in windows that end at these codes, each with a block of look-ahead."""
        graph, kept = self.backend.graph("dit"), KeptBlocks(self.dit)
        made, start, voice = [], 0, self.bundle.voice().feeds()
        for stop in borders:
            last = min(CODES, stop + self.dit.look_ahead_codes)
            feeds = {
                "x": self.noise[None, 2 * start : 2 * last],
                "codes": self.codes[None, start:last],
                "step": np.array([step]),
            }
            outputs = graph.run({**feeds, **voice, **kept.feeds(0, (stop - start - 1) // self.dit.block_codes)})
            kept.take(0, outputs)
            made.append(outputs["velocity"][0, : 2 * (stop - start)])
            start = stop
        return np.concatenate(made)


@pytest.fixture(scope="module")
def speech(tiny_bundle: Path) -> Speech:
    return Speech(tiny_bundle)


@pytest.fixture(scope="module")
def whole(speech: Speech) -> Floats:
    mel = speech.mel("whole")
    assert 0.3 < mel.std() < 10
    assert np.abs(np.diff(mel, axis=0)).max(axis=1).min() > 1e-3, "no two frames are alike"
    return mel


def errors(got: Floats, wanted: Floats) -> Floats:
    """Largest difference in each block, over the scale of what is wanted."""
    found: Floats = np.abs(got - wanted).reshape(-1, 24 * wanted.shape[1]).max(axis=1) / wanted.std()
    return found


@pytest.mark.parametrize("borders", [[12, 36, 84, 96], [12 * i for i in range(1, 9)], [48, 96]])
def test_velocities_of_windows_are_those_of_the_whole(speech: Speech, borders: list[int]) -> None:
    wanted = speech.velocity([CODES])
    assert wanted.std() > 0.3
    got = speech.velocity(borders)
    assert errors(got, wanted).max() < EXACT


def test_what_was_kept_matters(speech: Speech, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, or with that of another block, velocities are far from those of the whole."""
    wanted, given = speech.velocity([CODES]), KeptBlocks.feeds
    monkeypatch.setattr(KeptBlocks, "feeds", lambda self, evaluation, _: given(self, evaluation, 0))
    assert errors(speech.velocity([48, 96]), wanted)[4] > 100 * EXACT
    monkeypatch.setattr(KeptBlocks, "take", lambda *_: None)
    assert errors(speech.velocity([48, 96]), wanted)[4] > 100 * EXACT


WINDOWS = [SpeechWindows(), SpeechWindows((12,)), SpeechWindows((48,))]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_streamed_speech_is_the_whole_where_the_look_ahead_is(
    speech: Speech, whole: Floats, window: SpeechWindows
) -> None:
    """One block of look-ahead lacks its own: with a second one nothing is left of the difference."""
    assert errors(speech.mel(window, look_ahead_blocks=2), whole).max() < EXACT
    found = errors(speech.mel(window), whole)
    ends = np.cumsum([*window.chunks, *[window.chunks[-1]] * 8])
    last = {int(end) // 12 - 1 for end in ends if end < CODES}
    inside = [i for i in range(len(found)) if i not in last and i - 1 not in last]
    assert all(found[i] < EXACT for i in inside)
    assert found.max() < 100 * EXACT


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_streamed_speech_is_no_further_from_the_whole_than_with_solving_again(
    speech: Speech, whole: Floats, window: SpeechWindows, tmp_path: Path, tiny_bundle: Path
) -> None:
    before = Speech(as_before(tiny_bundle, tmp_path / "bundle"))
    again = before.mel(window)

    def rms(mel: Floats) -> float:
        return float(np.sqrt(np.mean((mel - whole) ** 2)) / whole.std())

    assert 0 < rms(speech.mel(window)) < 1.1 * rms(again) < 1e-3
    np.testing.assert_allclose(before.mel("whole"), whole, atol=EXACT * whole.std())


def as_before(root: Path, out: Path) -> Path:
    """The bundle as releases made it that kept nothing: what the DiT is given of a block before is fixed to nothing."""
    bundle = Bundle.open(root)
    assert bundle.manifest.dit is not None
    given = nothing_before(bundle.manifest.dit)
    shutil.copytree(root, out)
    spec = bundle.manifest.graphs["dit"]
    model = onnx.load(root / spec.file, load_external_data=False)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in given.items())
    for borders in (model.graph.input, model.graph.output):
        kept = [one for one in borders if one.name not in given and not one.name.startswith("present_")]
        del borders[:]
        borders.extend(kept)
    onnx.save(model, out / spec.file)
    inputs = tuple(tensor for tensor in spec.inputs if tensor.name not in given)
    spec = msgspec.structs.replace(spec, inputs=inputs, outputs=spec.outputs[:1])
    graphs = {**bundle.manifest.graphs, "dit": spec}
    dit = msgspec.structs.replace(bundle.manifest.dit, past_layers=())
    write_manifest(out, msgspec.structs.replace(bundle.manifest, graphs=graphs, dit=dit, schema_version=2))
    edit(out, lambda m: (m["dit"].pop("past_layers"), m["dit"].pop("past_width")))
    return out


def test_a_bundle_must_say_what_its_dit_takes(tiny_bundle: Path, tmp_path: Path) -> None:
    root = as_before(tiny_bundle, tmp_path / "bundle")
    assert Bundle.open(root).manifest.schema_version == 2
    edit(root, lambda m: m["dit"].update(past_layers=[0, 3]))
    with pytest.raises(BundleError, match=r"schema version 2 has no dit\.past_layers"):
        Bundle.open(root)
    edit(root, lambda m: m.update(schema_version=3))
    with pytest.raises(BundleError, match=r"graph 'dit' has no past_\*; dit\.past_layers is \(0, 3\)"):
        Bundle.open(root)


def test_bytes_are_counted(speech: Speech) -> None:
    kept, graph = KeptBlocks(speech.dit), speech.backend.graph("dit")
    feeds = {"x": speech.noise[None, :48], "codes": speech.codes[None, :24], "step": np.array([0])}
    for evaluation in (0, 1, 2, 0, 1, 2):
        kept.take(evaluation, graph.run({**feeds, **speech.bundle.voice().feeds(), **kept.feeds(evaluation, 0)}))
    assert kept.nbytes == kept_bytes(speech.dit, 3) == 3 * 2 * 2 * 2 * 24 * 128 * 4
