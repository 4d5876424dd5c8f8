"""Every exported graph against the transformers module it stands for: the figures of the page, and real inputs."""

from __future__ import annotations

import io
import re
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from omniport.export.models.audio_encoder import audio_case
from omniport.export.models.part import Case
from omniport.export.models.vision_encoder import vision_case
from omniport.export.validation.checks.graphs import case_checks, graph_checks
from omniport.runtime.backends import open_backend
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import image_input, load_image, video_input
from omniport.runtime.media.log_mel import chunk_mel, log_mel
from omniport.runtime.media.video import load_video
from support.comparison import assert_all_pass, context_of
from support.paths import REPOSITORY

SPEECH = Path("/usr/share/sounds/alsa/Front_Center.wav")
ROW = re.compile(r"^\| (\w+) \| .+? \| (\S+) \| \S+ \| \S+ \| (\S+) \|$", re.MULTILINE)


def assert_close(bundle: Path, checkpoint: Path, cases: list[Case]) -> None:
    graphs = tuple(dict.fromkeys(case.graph for case in cases))
    listed = {graph: [case for case in cases if case.graph == graph] for graph in graphs}
    assert_all_pass(list(case_checks(context_of(bundle, checkpoint, graphs), listed)))


@pytest.mark.parametrize("graph", PARTS)
def test_the_full_suite_holds_the_figures_of_the_page(graph: str, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """docs/results/parity.md: the same limits, and no error that is of another size than the largest there."""
    page = (REPOSITORY / "docs" / "results" / "parity.md").read_text(encoding="utf-8")
    rows = [(float(error), float(bound)) for name, error, bound in ROW.findall(page) if name == graph]
    context = context_of(tiny_bundle, tiny_checkpoint, (graph,))
    context.suite = "full"
    checks = list(graph_checks(context))
    assert_all_pass(checks)
    assert len(checks) >= len(rows) >= 2
    assert {check.limits["rel_rms"] for check in checks} == {bound for _, bound in rows}
    largest = max(float(check.figures["rel_rms"] or 0) for check in checks)
    assert largest <= 5 * max(error for error, _ in rows)


def tone(seconds: float) -> NDArray[np.float32]:
    """A voiced-like sound: harmonics of a gliding pitch under a syllable rate."""
    t = np.arange(int(16000 * seconds)) / 16000
    phase = 2 * np.pi * (140 * t + 15 * np.sin(2 * np.pi * t))
    wave = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    return (0.1 * wave).astype(np.float32)


@pytest.mark.skipif(not SPEECH.exists(), reason="Debian's alsa-utils, which holds the recordings, is not installed")
def test_human_speech(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    clips = {path.name: load_audio(path) for path in sorted(SPEECH.parent.glob("*.wav"))[:4]}
    assert_close(tiny_bundle, tiny_checkpoint, [audio_case(name, clip, manifest) for name, clip in clips.items()])


def test_photos(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    frontend = Bundle.open(tiny_bundle).manifest.vision
    small = msgspec.structs.replace(frontend, max_pixels=200 * 28 * 28)
    photos = {
        "astronaut": skimage.data.astronaut(),
        "odd crop": skimage.data.astronaut()[3:258, 11:400],
        "tall strip": skimage.data.astronaut()[:, 200:260],
        "grey": skimage.data.camera()[:120, :333],
    }
    cases = [vision_case(name, image_input(load_image(photo), small)) for name, photo in photos.items()]
    assert_close(tiny_bundle, tiny_checkpoint, cases)


def clip_with_sound() -> bytes:
    """Two seconds of a moving square with a beep."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(20):
            picture = np.full((120, 160, 3), 40, np.uint8)
            picture[20:60, 5 * i : 5 * i + 40] = (250, 120, 30)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode(None))
        samples = (tone(2.0) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return buffer.getvalue()


def test_video_with_sound(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    clip = load_video(clip_with_sound(), manifest.vision, with_audio=True)
    assert clip.audio is not None
    pictures = vision_case("frames", video_input(clip.frames, manifest.vision))
    assert_close(tiny_bundle, tiny_checkpoint, [pictures, audio_case("sound", clip.audio, manifest)])


def test_batched_chunks_equal_single_ones(tiny_bundle: Path) -> None:
    """Attention never crosses a chunk, so encoding as the sound arrives is exact."""
    bundle = Bundle.open(tiny_bundle)
    chunks, frames = chunk_mel(log_mel(tone(9.0), bundle.manifest.audio), bundle.manifest.audio)
    graph = open_backend("ort-cpu", bundle).graph("audio_encoder")
    together = graph.run({"mel": chunks, "frames": frames})["embeds"]
    single = [graph.run({"mel": chunks[i : i + 1], "frames": frames[i : i + 1]})["embeds"] for i in range(len(frames))]
    assert together.std() > 0.1
    np.testing.assert_allclose(np.concatenate(single), together, atol=1e-5)
