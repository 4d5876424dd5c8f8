"""Audio in, against transformers' WhisperFeatureExtractor and audio_utils under Qwen2.5-Omni's settings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import AudioFrontend
from omniport.runtime.errors import MediaError
from omniport.runtime.media import audio
from omniport.runtime.media import log_mel as mel_module
from omniport.runtime.media.audio import load_audio
from omniport.runtime.media.log_mel import audio_tokens, chunk_mel, log_mel
from support.timing import least, ratio

FRONTEND = AudioFrontend()
SPEECH = sorted(Path("/usr/share/sounds/alsa").glob("*_*.wav"))
needs_speech = pytest.mark.skipif(
    not SPEECH, reason="no speech recordings here: the Debian package alsa-utils has them"
)


@pytest.fixture(scope="module")
def extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, chunk_length=300)


def reference_mel(extractor: Any, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """As the reference processor calls it: padded to 300 s, cut to the attention mask."""
    out = extractor(samples, sampling_rate=16000, return_attention_mask=True, return_tensors="np", padding="max_length")
    frames = int(out["attention_mask"].sum())
    return out["input_features"][0][:, :frames]


def speech_like(seconds: float, rate: int = 16000, seed: int = 0) -> NDArray[np.float32]:
    """A buzzing, gliding, pausing signal with noise: energy at all mel bands and at silence."""
    generator = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    pitch = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * t)) / rate
    voice = sum(np.sin(k * pitch) / k for k in range(1, 25))
    envelope = np.clip(np.sin(2 * np.pi * 1.3 * t), 0, None)
    return (0.2 * envelope * voice + 0.003 * generator.standard_normal(t.shape)).astype(np.float32)


def write(path: Path, samples: NDArray[Any], rate: int = 16000, **kwargs: Any) -> Path:
    soundfile.write(path, samples, rate, **kwargs)
    return path


# --- log-mel -----------------------------------------------------------------------------------------------------


def assert_mel_equal(extractor: Any, samples: NDArray[np.float32]) -> None:
    mel, expected = log_mel(samples, FRONTEND), reference_mel(extractor, samples)
    assert mel.dtype == np.float32
    assert mel.flags.c_contiguous
    assert mel.shape == expected.shape == (128, -(-samples.shape[0] // 160))
    assert np.abs(mel - expected).max() <= 1e-4


@needs_speech
@pytest.mark.parametrize("path", SPEECH[:4], ids=lambda p: p.stem)
def test_mel_of_speech(extractor: Any, path: Path) -> None:
    samples = load_audio(path)
    assert np.sqrt(np.mean(samples**2)) > 0.01
    expected = reference_mel(extractor, samples)
    assert expected.std() > 0.2
    assert_mel_equal(extractor, samples)


@pytest.mark.parametrize("gain", [1e-4, 1.0, 20.0])
def test_mel_of_synthetic_signal(extractor: Any, gain: float) -> None:
    samples = gain * speech_like(2.3)
    assert np.abs(samples).max() > 0.3 * gain
    assert_mel_equal(extractor, samples.astype(np.float32))


@pytest.mark.parametrize("length", [1, 2, 159, 160, 161, 199, 200, 201, 400, 12345])
def test_mel_of_short_and_odd_lengths(extractor: Any, length: int) -> None:
    assert_mel_equal(extractor, (0.3 * np.random.default_rng(1).standard_normal(length)).astype(np.float32))


@pytest.mark.parametrize("kind", ["tone", "silence", "constant", "loud end"])
def test_mel_of_extreme_signals(extractor: Any, kind: str) -> None:
    t = np.arange(16050) / 16000
    samples = {
        "tone": 0.5 * np.sin(2 * np.pi * 440 * t),
        "silence": 0 * t,
        "constant": 0 * t + 0.5,
        "loud end": 0.9 * (t > 0.9999),  # the loudest frame may lie past the end: it sets the floor
    }[kind]
    assert_mel_equal(extractor, samples.astype(np.float32))


@pytest.mark.parametrize("missing", [0, 30, 200])
def test_mel_at_the_length_limit(missing: int) -> None:
    """A clip that fills the limit is reflected at its end, as the reference's STFT does."""
    from transformers import WhisperFeatureExtractor

    samples = speech_like(6.0)[: 6 * 16000 - missing] + np.float32(0.1)
    expected = reference_mel(WhisperFeatureExtractor(feature_size=128, chunk_length=6), samples)
    mel = log_mel(samples, AudioFrontend(max_seconds=6.0))
    assert mel.shape == expected.shape
    assert np.abs(mel - expected).max() <= 1e-4


def test_mel_filters_are_slaney() -> None:
    from transformers.audio_utils import mel_filter_bank

    expected = mel_filter_bank(201, 128, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").T
    filters = mel_module.mel_filters(128, 400, 16000)
    assert filters.sum() > 1
    np.testing.assert_allclose(filters, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.zeros((2, 400), np.float32), r"shape \[2, 400\]"),
        (np.zeros(0, np.float32), "n >= 1"),
        (np.full(400, np.nan, np.float32), "NaN"),
        (np.zeros(301 * 16000, np.float32), "too long: 301.0 s"),
    ],
)
def test_mel_refuses(samples: NDArray[np.float32], words: str) -> None:
    with pytest.raises(MediaError, match=words):
        log_mel(samples, FRONTEND)


# --- chunks and token counts -------------------------------------------------------------------------------------


def test_audio_tokens_as_the_reference() -> None:
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import _get_feat_extract_output_lengths

    assert [audio_tokens(frames) for frames in range(1, 1200)] == [
        int(_get_feat_extract_output_lengths(frames)) for frames in range(1, 1200)
    ]
    assert [audio_tokens(frames) for frames in (0, 1, 2, 3, 200)] == [0, 0, 0, 1, 50]


@pytest.mark.parametrize("frames", [3, 199, 200, 201, 203, 999])
def test_chunks_as_the_reference(frames: int) -> None:
    import torch
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import chunk_and_pad_features

    mel = np.random.default_rng(0).standard_normal((128, frames)).astype(np.float32)
    chunks, valid = chunk_mel(mel, FRONTEND)
    expected, lengths = chunk_and_pad_features(torch.from_numpy(mel), torch.tensor([frames]), 100)
    assert chunks.shape == (-(-frames // 200), 128, 200)
    assert valid.tolist() == lengths.tolist()
    width = expected.shape[2]
    np.testing.assert_array_equal(chunks[:, :, :width], expected.numpy())
    assert not chunks[:, :, width:].any()
    assert sum(audio_tokens(int(n)) for n in valid) == audio_tokens(frames)


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_too_short_for_a_token(frames: int) -> None:
    with pytest.raises(MediaError, match=r"too short: \d mel frames.*at least 3 \(30 ms\)"):
        chunk_mel(np.zeros((128, frames), np.float32), FRONTEND)


def test_chunk_mel_refuses_wrong_dimensions() -> None:
    with pytest.raises(MediaError, match=r"\[80, 300\].*\[128, frames\]"):
        chunk_mel(np.zeros((80, 300), np.float32), FRONTEND)


# --- reading -----------------------------------------------------------------------------------------------------


@needs_speech
@pytest.mark.parametrize("path", SPEECH[:2], ids=lambda p: p.stem)
def test_speech_as_the_reference_reads_it(path: Path) -> None:
    from transformers.audio_utils import load_audio as reference

    np.testing.assert_array_equal(load_audio(path), reference(str(path), 16000, backend="soundfile"))


@pytest.mark.parametrize(("name", "rate"), [("a.wav", 44100), ("b.flac", 48000), ("c.ogg", 22050), ("d.mp3", 8000)])
def test_stereo_files_as_the_reference(tmp_path: Path, name: str, rate: int) -> None:
    from transformers.audio_utils import load_audio as reference

    left, right = speech_like(1.01, rate), speech_like(1.01, rate, seed=5)[::-1]
    path = write(tmp_path / name, np.stack([left, right], axis=1), rate)
    samples = load_audio(path)
    assert samples.dtype == np.float32
    assert np.sqrt(np.mean(samples**2)) > 0.01
    np.testing.assert_allclose(samples, reference(str(path), 16000, backend="soundfile"), atol=1e-6)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), samples)
    np.testing.assert_array_equal(load_audio(str(path)), samples)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("matroska", "pcm_s16le"), ("webm", "libopus")])
def test_other_formats_through_ffmpeg(tmp_path: Path, container: str, codec: str) -> None:
    import av

    original = speech_like(1.5, 48000)
    path = tmp_path / "sound.bin"
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=48000, layout="stereo")
        pcm = np.repeat(np.round(original * 32767).astype(np.int16), 2)[None]
        for at in range(0, original.shape[0], 960):
            frame = av.AudioFrame.from_ndarray(pcm[:, 2 * at : 2 * at + 1920], format="s16", layout="stereo")
            frame.sample_rate, frame.pts = 48000, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    samples, expected = load_audio(path), load_audio((original, 48000))
    n = min(samples.shape[0], expected.shape[0])
    assert abs(samples.shape[0] - expected.shape[0]) < 0.05 * 16000
    assert np.corrcoef(samples[:n], expected[:n])[0, 1] > 0.99
    np.testing.assert_array_equal(load_audio(path.read_bytes()), samples)


def test_arrays_are_scaled_and_mixed_down() -> None:
    samples = np.array([0.5, -0.25, 0.0, 0.125] * 10)
    expected = samples.astype(np.float32)
    for array in (
        samples,
        samples.astype(np.float32),
        samples.astype(np.float16),
        (samples * 2**15).astype(np.int16),
        (samples * 2**31).astype(np.int32),
        (samples * 2**15).astype(">i2"),
        (samples * 2**7).astype(np.int8),
        (samples * 128 + 128).astype(np.uint8),
    ):
        loaded = load_audio((array, 16000))
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, expected)
    two = np.stack([samples, 3 * samples])
    np.testing.assert_allclose(load_audio((two, 16000)), 2 * expected)
    np.testing.assert_allclose(load_audio((two.T, 16000)), 2 * expected)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 22050.5])
def test_resampling_keeps_a_tone(rate: float) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(round(rate)) / rate).astype(np.float32)
    samples = load_audio((tone, rate))
    assert samples.shape[0] == int(np.ceil(tone.shape[0] * 16000 / rate))
    expected = np.sin(2 * np.pi * 1000 * np.arange(samples.shape[0]) / 16000)
    np.testing.assert_allclose(samples[800:-800], expected[800:-800], atol=2e-3)


def test_thirty_seconds_are_read_quickly(tmp_path: Path) -> None:
    """Time grows with the length, and is a small part of what the sound takes to be heard."""
    paths = {seconds: write(tmp_path / f"{seconds}.wav", speech_like(seconds, 48000), 48000) for seconds in (7.5, 30.0)}

    def read(seconds: float) -> int:
        return len(chunk_mel(log_mel(load_audio(paths[seconds]), FRONTEND), FRONTEND)[0])

    assert read(30.0) == 15
    assert ratio(lambda: read(30.0), lambda: read(7.5), rounds=3) < 4 * 2.5
    assert least(lambda: read(30.0), rounds=3) < 30 / 5  # 0.1 s on a desktop core


# --- what cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"this is not sound at all " * 100, "cannot be decoded"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "cannot be decoded"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(MediaError, match=words):
            load_audio(source)


def test_random_bytes_are_refused() -> None:
    with pytest.raises(MediaError):
        load_audio(np.random.default_rng(0).bytes(5000))


def test_missing_and_unsuitable_paths(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="does not exist"):
        load_audio(tmp_path / "nowhere.wav")
    with pytest.raises(MediaError, match="not a regular file"):
        load_audio(tmp_path)
    with pytest.raises(MediaError, match="URLs are not fetched"):
        load_audio("https://example.com/a.wav")
    with pytest.raises(MediaError, match=r"cannot be opened|does not exist"):
        load_audio("a\0b.wav")


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no samples"):
        load_audio(write(tmp_path / "none.wav", np.zeros(0, np.float32)))
    with pytest.raises(MediaError, match="no samples"):
        load_audio((np.zeros(0), 16000))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
@pytest.mark.parametrize("riff", [0, 4088])
def test_wav_whose_recorder_was_killed(tmp_path: Path, subtype: str, riff: int) -> None:
    """The sizes in its header were never written: it is read to its end, to the samples that a whole file gives."""
    path = write(tmp_path / "whole.wav", speech_like(0.3), subtype=subtype)
    expected = load_audio(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = riff.to_bytes(4, "little")
    content[at : at + 4] = bytes(4)
    np.testing.assert_array_equal(load_audio(bytes(content)), expected)


def test_finished_wav_without_samples_has_none(tmp_path: Path) -> None:
    """What follows an empty ``data`` chunk in a whole file is not sound."""
    content = bytearray(write(tmp_path / "none.wav", np.zeros(0, np.float32)).read_bytes())
    content += b"LIST" + (400).to_bytes(4, "little") + b"INFO" + bytes(396)
    content[4:8] = (len(content) - 8).to_bytes(4, "little")
    with pytest.raises(MediaError, match="no samples"):
        load_audio(bytes(content))


def test_nan_and_infinite_samples(tmp_path: Path) -> None:
    samples = speech_like(0.5)
    samples[4000] = np.nan
    with pytest.raises(MediaError, match=r"1 NaN or infinite samples \(the first at 0.250 s\)"):
        load_audio(write(tmp_path / "nan.wav", samples, subtype="FLOAT"))
    with pytest.raises(MediaError, match="NaN or infinite"):
        load_audio((np.array([0.0, np.inf, 1e300]), 44100))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ((np.zeros(10), 0), "sampling rate of 0"),
        ((np.zeros(10), -16000), "sampling rate of -16000"),
        ((np.zeros(10), float("nan")), "sampling rate of nan"),
        ((np.zeros(10), 1), "1000 to 384000 Hz"),
        ((np.zeros(10), "16000"), "sample rate is a str"),
        ((np.zeros(10),), "1 items"),
        ((16000, np.zeros(10)), "swap them"),
        ((np.float32(1), 16000), r"shape \[\]"),
        ((np.zeros((2, 2, 2)), 16000), r"shape \[2, 2, 2\]"),
        ((np.zeros((100, 100)), 16000), r"shape \[100, 100\]"),
        ((np.zeros(10, np.int64), 16000), "dtype int64"),
        ((np.zeros(10, bool), 16000), "dtype bool"),
        ((np.zeros(10, complex), 16000), "dtype complex128"),
        (([[1.0], [1.0, 2.0]], 16000), "no array"),
        (12, "type int cannot be read; pass a path, bytes, .*samples at 16 kHz"),
    ],
)
def test_arrays_that_are_not_audio(source: Any, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        load_audio(source)


def test_tensors_and_bare_samples_as_qwens_tool_takes_them() -> None:
    import torch

    samples = speech_like(0.3)
    expected = load_audio((samples, 16000))
    np.testing.assert_array_equal(load_audio(samples), expected)
    for tensor in (torch.from_numpy(samples), torch.from_numpy(samples).requires_grad_()):
        np.testing.assert_array_equal(load_audio((tensor, 16000)), expected)
    half = torch.from_numpy(samples).to(torch.bfloat16)
    np.testing.assert_array_equal(load_audio((half, 16000)), half.float().numpy())
    with pytest.raises(MediaError, match="no array"):
        load_audio((torch.zeros(10, device="meta"), 16000))


def test_integers_that_only_became_floats() -> None:
    """At the scale of int16 the model would hear noise; what goes a little beyond 1 is clipped sound."""
    loud = speech_like(0.3)
    assert load_audio((loud / np.abs(loud).max() * 4, 16000)).max() > 1
    with pytest.raises(MediaError, match=r"reaches \d+; float samples lie in -1..1: divide 16-bit values by 32768"):
        load_audio((np.round(loud * 32767), 16000))


def test_file_urls(tmp_path: Path) -> None:
    path = write(tmp_path / "a b.wav", speech_like(0.2))
    expected = load_audio(path)
    for name in (f"file://{path}", path.as_uri(), f"file://localhost{path}", str(path)):
        np.testing.assert_array_equal(load_audio(name), expected)
    with pytest.raises(MediaError, match="does not exist"):
        load_audio("file:///nowhere.wav")


def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.flac", speech_like(3.0))
    assert load_audio(path, max_seconds=3.0).shape == (48000,)
    with pytest.raises(MediaError, match=r"too long: 3\.0 s or more, at most 2 s"):
        load_audio(path, max_seconds=2.0)
    monkeypatch.setattr(audio, "READ_BLOCK", 4000)
    assert load_audio(path).shape == (48000,)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    path = write(tmp_path / "a.wav", speech_like(0.1))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MediaError, match=r"pip install 'omniport\[media\]'"):
        load_audio(path)


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    target = write(tmp_path / "secret.wav", speech_like(1.0))
    playlist = tmp_path / "list.ffconcat"
    playlist.write_text(f"ffconcat version 1.0\nfile '{target.name}'\n")
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_audio(playlist)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load_audio(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n".encode())


def test_memory_stream_is_left_alone() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, speech_like(0.2), 16000, format="WAV")
    content = buffer.getvalue()
    first, second = load_audio(content), load_audio(content)
    np.testing.assert_array_equal(first, second)


def test_a_length_in_the_header_is_believed_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(16000 * 4, np.int16), 16000)
    blocks = audio._sound_blocks
    monkeypatch.setattr(audio, "_sound_blocks", lambda reader: decoded.append(reader) or blocks(reader))
    with pytest.raises(MediaError, match="too long"):
        load_audio(path, max_seconds=3)
    assert decoded == []


def test_a_rate_beyond_every_float() -> None:
    with pytest.raises(MediaError, match="sampling rate of 1000"):
        load_audio((np.zeros(1600, np.float32), 10**400))


@pytest.mark.parametrize("shape", [(0, 1600), (1600, 0), (0, 0)])
def test_no_channels_are_no_samples(shape: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match="holds no samples"):
        load_audio((np.zeros(shape, np.float32), 16000))


def test_a_message_names_no_object_of_python() -> None:
    with pytest.raises(MediaError, match="libsndfile: Format not recognised"):
        load_audio(b"no sound at all")
