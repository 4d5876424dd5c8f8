"""Every exported graph against the transformers module it stands for, on random and on real inputs."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.evaluation import cases as parity
from omniport.export.evaluation.cases import (
    Case,
    ParityRow,
    audio_case,
    bigvgan_case,
    check_bundle,
    dit_case,
    vision_case,
)
from omniport.export.models.voices import load_speakers
from omniport.runtime.backends import open_backend
from omniport.runtime.bundle.manifest import VisionFrontend
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import UsageError
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.image import image_input, load_image, video_input
from omniport.runtime.media.video import load_video

SPEECH = Path("/usr/share/sounds/alsa/Front_Center.wav")
LIMIT = 1e-4


def assert_close(rows: Sequence[ParityRow]) -> None:
    assert rows
    for row in rows:
        assert row.energy > parity.MIN_ENERGY, f"{row.graph} {row.case}: the reference is silent"
        assert row.ok, f"{row.graph} {row.case}: relative RMS error {row.rel_rms:.2e}"
        assert row.rel_rms <= LIMIT


def test_standard_cases_cover_every_graph(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    seen: list[str] = []
    rows = check_bundle(tiny_bundle, tiny_checkpoint, progress=lambda case, done, total: seen.append(case))
    assert_close(rows)
    assert {row.graph for row in rows} == set(PARTS)
    assert len(seen) == len(rows)


def tone(seconds: float) -> NDArray[np.float32]:
    """A voiced-like sound: harmonics of a gliding pitch under a syllable rate."""
    t = np.arange(int(16000 * seconds)) / 16000
    phase = 2 * np.pi * (140 * t + 15 * np.sin(2 * np.pi * t))
    wave = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * t))
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.1, 1.99, 2.0, 10.0, 3.333])
def test_audio_lengths(seconds: float, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """One and five full chunks, a partial last chunk, hardly any sound."""
    assert_close(
        check_bundle(
            tiny_bundle, tiny_checkpoint, cases=lambda bundle, _: [audio_case("tone", tone(seconds), bundle.manifest)]
        )
    )


@pytest.mark.skipif(not SPEECH.exists(), reason="Debian's alsa-utils, which holds the recordings, is not installed")
def test_human_speech(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    clips = {path.name: load_audio(path) for path in sorted(SPEECH.parent.glob("*.wav"))[:4]}
    assert_close(
        check_bundle(
            tiny_bundle,
            tiny_checkpoint,
            cases=lambda bundle, _: [audio_case(name, clip, bundle.manifest) for name, clip in clips.items()],
        )
    )


def photo_cases(bundle: Bundle, _: Checkpoint) -> list[Case]:
    frontend = bundle.manifest.vision
    small = with_pixel_cap(frontend, 200 * 28 * 28)
    photos = {
        "astronaut": skimage.data.astronaut(),
        "odd crop": skimage.data.astronaut()[3:258, 11:400],
        "tall strip": skimage.data.astronaut()[:, 200:260],
        "grey": skimage.data.camera()[:120, :333],
    }
    return [vision_case(name, image_input(load_image(photo), small)) for name, photo in photos.items()]


def with_pixel_cap(frontend: VisionFrontend, max_pixels: int) -> VisionFrontend:

    return msgspec.structs.replace(frontend, max_pixels=max_pixels)


def test_photos(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    assert_close(check_bundle(tiny_bundle, tiny_checkpoint, cases=photo_cases))


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
    def cases(bundle: Bundle, _: Checkpoint) -> list[Case]:
        clip = load_video(clip_with_sound(), bundle.manifest.vision, with_audio=True)
        assert clip.audio is not None
        return [
            vision_case("frames", video_input(clip.frames, bundle.manifest.vision)),
            audio_case("sound", clip.audio, bundle.manifest),
        ]

    assert_close(check_bundle(tiny_bundle, tiny_checkpoint, cases=cases))


def test_every_solver_step(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """The folded modulation tables, entry by entry, for both voices and lengths around the attention block."""

    def cases(bundle: Bundle, ckpt: Checkpoint) -> list[Case]:
        rng = np.random.default_rng(1)
        assert bundle.manifest.solver is not None
        voices = load_speakers(ckpt.path / "spk_dict.pt")
        listed = []
        for step in range(len(bundle.manifest.solver.table)):
            length = (1, 11, 12, 13, 25, 48)[step % 6]
            voice = sorted(voices)[step % 2]
            x = rng.standard_normal((1, 2 * length, 80), np.float32)
            codes = rng.integers(0, 8193, (1, length))
            listed.append(dit_case(f"step {step}", x, codes, step, voice, bundle, voices[voice]))
        return listed

    assert_close(check_bundle(tiny_bundle, tiny_checkpoint, cases=cases))


@pytest.mark.parametrize("frames", [2, 3, 24, 97])
def test_vocoder_lengths(frames: int, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    mel = np.random.default_rng(2).normal(-5, 2, (1, 80, frames)).astype(np.float32)
    rows = check_bundle(tiny_bundle, tiny_checkpoint, cases=lambda *_: [bigvgan_case("mel", mel)])
    assert_close(rows)


def test_batched_chunks_equal_single_ones(tiny_bundle: Path) -> None:
    """Attention never crosses a chunk, so encoding as the sound arrives is exact."""
    from omniport.runtime.media.log_mel import chunk_mel, log_mel

    bundle = Bundle.open(tiny_bundle)
    chunks, frames = chunk_mel(log_mel(tone(9.0), bundle.manifest.audio), bundle.manifest.audio)
    graph = open_backend("ort-cpu", bundle).graph("audio_encoder")
    together = graph.run({"mel": chunks, "frames": frames})["embeds"]
    single = [graph.run({"mel": chunks[i : i + 1], "frames": frames[i : i + 1]})["embeds"] for i in range(len(frames))]
    assert together.std() > 0.1
    np.testing.assert_allclose(np.concatenate(single), together, atol=1e-5)


def test_a_wrong_graph_is_found(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """The check can fail: the sound is shifted by one sample for one side only."""

    def cases(bundle: Bundle, _: Checkpoint) -> list[Case]:
        right, wrong = (audio_case("tone", tone(2.0)[i:], bundle.manifest) for i in (0, 160))
        cut = dataclasses.replace(right, ours=wrong.ours, reference=lambda module: right.reference(module)[:49])
        return [dataclasses.replace(cut, ours=lambda graph: wrong.ours(graph)[:49])]

    (row,) = check_bundle(tiny_bundle, tiny_checkpoint, cases=cases)
    assert row.rel_rms > 0.01
    assert not row.ok


def test_silence_is_no_proof() -> None:
    assert not ParityRow("bigvgan", "silence", 0.0, 0.0, 0.0, 1e-4).ok


def test_another_checkpoint_is_refused(tiny_bundle: Path, tiny_outlier_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="exported from"):
        check_bundle(tiny_bundle, tiny_outlier_checkpoint)
