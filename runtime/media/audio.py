"""Decode and resample audio: whole recordings, or a live stream.

Files are decoded by libsndfile (wav, flac, ogg, mp3, ...), and by FFmpeg (PyAV) where libsndfile does not know the
format. Channels are averaged; soxr's HQ resampler gives ceil(n * out / in) samples: the steps of
``transformers.audio_utils.load_audio`` with its soundfile backend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MediaError
from ..system.stderr import dropped_from_stderr
from .source import as_array, check_source, describe, is_array, parsing, require, stream

AudioSource = Any  # Source | (samples, rate) | samples: tensors of libraries that are no dependency have no name here
Samples = NDArray[np.float32]

#: longest recording that is decoded at all: bounds memory against files whose header or content lies
MAX_SECONDS = 3600.0
#: sampling rates taken; a rate of 1 Hz in a damaged header would multiply the samples by 16,000
RATES = (1_000, 384_000)
#: a hole in a track's time stamps longer than this becomes silence (seconds)
GAP = 0.05
MAX_CHANNELS = 32
#: loudest float sample taken: sound may go beyond 1, by 24 dB at most, but values of 16 bits must not pass for it
MAX_LEVEL = 16.0
#: sampling rate of samples that come without one, as Qwen's own tools have it (Hz)
BARE_RATE = 16000
READ_BLOCK = 1 << 18
#: lines of mpg123
_MPG123 = re.compile(rb"\s*$|\[src/libmpg123/|Note: |Warning: ")


def load_audio(source: AudioSource, sampling_rate: int = 16000, *, max_seconds: float = MAX_SECONDS) -> Samples:
    """Read a recording as mono float32 samples at ``sampling_rate``.

    Args:
        source: a path or ``file://`` URL, the bytes of a file, ``(samples, sample_rate)``, or samples alone, which are
            at 16 kHz. Samples are an array or tensor [n], [n, channels] or [channels, n] (the shorter axis holds the
            channels); floats lie in -1..1, int16, int32, int8 and uint8 are scaled to it.
        sampling_rate: of the result, Hz.
        max_seconds: longer recordings are refused before they fill memory.

    Returns:
        float32 [n], n >= 1, all finite.

    Raises:
        MediaError: missing, unreadable, empty or too long file; no samples; NaN, infinite or far too large samples; a
            shape, dtype or rate that cannot be audio.
    """
    if is_array(source):
        source = (source, BARE_RATE)
    if isinstance(source, tuple):
        label = "audio array"
        samples, rate = pcm(source)
        _check_length(samples.shape[0], rate, max_seconds, label)
        check_level(samples, rate, label)
        made = resample(samples, rate, sampling_rate)
    else:
        checked = check_source(source, "audio")
        label = f"audio {describe(checked)}"
        made = _decode(checked, label, max_seconds, sampling_rate)
    if made.shape[0] == 0:
        raise MediaError(f"{label} holds no samples; record or export it again")
    return made


def check_level(samples: Samples, rate: float, label: str, before: int = 0) -> None:
    """MediaError if any sample is NaN or infinite, or if they are integers that only became floats.

    Args:
        before: samples of the recording that came before these.
    """
    finite = np.isfinite(samples)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise MediaError(
            f"{label} holds {bad.size} NaN or infinite samples (the first at {(before + bad[0]) / rate:.3f} s); "
            "expected finite samples in -1..1: fix the recording or replace them"
        )
    level = float(np.abs(samples).max(initial=0.0))
    if level > MAX_LEVEL:
        raise MediaError(
            f"{label} reaches {level:g}; float samples lie in -1..1: divide 16-bit values by 32768, or pass them as "
            "int16"
        )


def resample(samples: Samples, rate: float, to: float) -> Samples:
    """soxr HQ to ceil(n * to / rate) samples."""
    if rate == to:
        return np.ascontiguousarray(samples, dtype=np.float32)
    wanted = math.ceil(samples.shape[0] * to / rate)
    resampled: Samples = require("soxr").resample(samples, rate, to, quality="HQ")[:wanted]
    return np.pad(resampled, (0, wanted - resampled.shape[0])).astype(np.float32, copy=False)


class ResampleStream:
    """Resamples a clip that arrives in pieces: the same samples, bit for bit, as ``resample`` gives for all of it.

    Args:
        rate: of the samples that come, Hz.
        to: of the samples that leave, Hz.
    """

    def __init__(self, rate: float, to: float) -> None:
        self.rate = rate
        self._to = to
        self._stream = (
            None if rate == to else require("soxr").ResampleStream(rate, to, 1, dtype="float32", quality="HQ")
        )
        self._taken = self._given = 0

    def push(self, samples: Samples) -> Samples:
        """Take float32 [n]; gives what is ready, float32 [m]: the resampler looks ahead by some milliseconds."""
        self._taken += samples.shape[0]
        return self._give(samples if self._stream is None else self._stream.resample_chunk(samples))

    def finish(self) -> Samples:
        """The clip has ended: gives the samples that are left."""
        if self._stream is None:
            return np.zeros(0, np.float32)
        rest = self._stream.resample_chunk(np.zeros(0, np.float32), last=True)
        wanted = math.ceil(self._taken * self._to / self.rate) - self._given
        return self._give(np.pad(rest[:wanted], (0, max(0, wanted - rest.shape[0]))))

    def _give(self, samples: Samples) -> Samples:
        self._given += samples.shape[0]
        return np.ascontiguousarray(samples, np.float32)


def _check_rate(rate: Any, label: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(f"{label} has a sampling rate of {rate} Hz; expected {RATES[0]} to {RATES[1]} Hz")


def _check_length(samples: int, rate: float, max_seconds: float, label: str) -> None:
    if samples > max_seconds * rate:
        raise MediaError(
            f"{label} is too long: {samples / rate:.1f} s or more, at most {max_seconds:g} s are taken; "
            "cut it into shorter clips"
        )


def pcm(source: tuple[Any, ...]) -> tuple[Samples, float]:
    """Check and scale ``(samples, sample_rate)``, see ``load_audio``; mono float32 [n], which may be empty or hold NaN.

    Raises:
        MediaError: a shape, dtype or rate that cannot be audio.
    """
    if len(source) != 2:
        raise MediaError(f"audio tuple has {len(source)} items; expected (samples, sample_rate)")
    values, rate = source
    if isinstance(values, Real) and not isinstance(rate, Real):
        raise MediaError("audio tuple looks like (sample_rate, samples); expected (samples, sample_rate): swap them")
    if not isinstance(rate, Real) or isinstance(rate, bool):
        raise MediaError(f"sample rate is a {type(rate).__name__}; expected a positive number of Hz")
    _check_rate(rate, "audio array")
    array = as_array(values, "audio samples")
    if array.ndim not in (1, 2) or (array.ndim == 2 and min(array.shape) > MAX_CHANNELS):
        raise MediaError(
            f"audio array has shape {list(array.shape)}; expected [n], [n, channels] or [channels, n] "
            f"with at most {MAX_CHANNELS} channels"
        )
    if array.size == 0:  # of no channels as well, whose mean would be NaN
        return np.zeros(0, np.float32), float(rate)
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        array = array.T
    return _mono(array), float(rate)


def _mono(values: NDArray[Any]) -> Samples:
    """Samples [n] or [channels, n] of any type as mono float32 [n] in -1..1."""
    kind, bits = values.dtype.kind, values.dtype.itemsize * 8
    if kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which is refused by the caller
            scaled: Samples = values.astype(np.float32, copy=False)
    elif kind == "i" and bits <= 32:
        scaled = (values / np.float64(1 << (bits - 1))).astype(np.float32)
    elif values.dtype == np.uint8:
        scaled = ((values.astype(np.float32) - 128) / 128).astype(np.float32)
    else:
        raise MediaError(
            f"audio array has dtype {values.dtype}; expected float in -1..1, int8, int16, int32 or uint8: convert it"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        mono: Samples = scaled if scaled.ndim == 1 else scaled.mean(axis=0, dtype=np.float32)
    return mono


def _decode(source: Path | bytes, label: str, max_seconds: float, to: float) -> Samples:
    """libsndfile first, FFmpeg for what it does not know."""
    soundfile = require("soundfile")
    file = stream(source) if isinstance(source, bytes) else str(source)
    try:
        with _quiet(source), soundfile.SoundFile(file) as reader:
            rate = float(reader.samplerate)
            _check_rate(rate, label)
            _check_channels(reader.channels, label)
            if 0 < reader.frames < 1 << 48:  # more is how libsndfile says "not known"
                _check_length(reader.frames, rate, max_seconds, label)
            if reader.frames or not _unfinished(source):
                return _gather(_sound_blocks(reader), label, max_seconds, to)
        first = "no samples"
    except MediaError:
        raise
    except Exception as error:  # noqa: BLE001  whatever it is, FFmpeg may know better
        first = str(error).removeprefix(f"Error opening {file!r}: ")
    with (
        parsing(
            f"{label} cannot be decoded (libsndfile: {first.rstrip('.')}; FFmpeg's reason follows)",
            "expected wav, flac, ogg, mp3 or another format that FFmpeg reads: convert it or check the file",
        ),
        stream(source) as opened,
        open_av(opened) as container,
    ):
        if not container.streams.audio:
            raise MediaError(f"{label} has no audio track; pass a recording")
        return read_track(container, label, to, max_seconds)


def _quiet(source: Path | bytes) -> AbstractContextManager[object]:
    """libsndfile reads MP3 with mpg123, which tells stderr about every damaged frame."""
    with stream(source) as opened:
        head = opened.read(3)
    is_mp3 = head == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    return dropped_from_stderr(_MPG123) if is_mp3 else nullcontext()


def _unfinished(source: Path | bytes) -> bool:
    """Whether a WAV file's recorder left before it wrote the sizes: the first is not that of the file."""
    with stream(source) as opened:
        head = opened.read(12)
        size = opened.seek(0, 2)
    return head[:4] == b"RIFF" and head[8:] == b"WAVE" and int.from_bytes(head[4:8], "little") not in (size - 8, size)


def _sound_blocks(reader: Any) -> Iterator[tuple[Samples, float]]:
    # Blocks, because the frame count in a header may be wrong and one read would allocate all of it.
    while len(block := reader.read(READ_BLOCK, dtype="float32", always_2d=True)):
        yield _mono(block.T), float(reader.samplerate)


def _gather(blocks: Iterator[tuple[Samples, float]], label: str, max_seconds: float, to: float) -> Samples:
    """Blocks of one rate, resampled to ``to`` while they come; refuses to grow past ``max_seconds``."""
    kept: list[Samples] = []
    total = 0
    resampler: ResampleStream | None = None
    for block, rate in blocks:
        resampler = resampler or ResampleStream(rate, to)
        check_level(block, rate, label, total)
        total += block.shape[0]
        _check_length(total, rate, max_seconds, label)
        kept.append(resampler.push(block))
    if resampler is None or not total:
        return np.zeros(0, np.float32)
    return np.concatenate([*kept, resampler.finish()])


def _check_channels(channels: int, label: str) -> None:
    if channels > MAX_CHANNELS:
        raise MediaError(f"{label} has {channels} channels, at most {MAX_CHANNELS} are taken: mix it down")


def open_av(opened: Any) -> Any:
    """Open a binary stream with PyAV. No protocol is allowed, so a playlist cannot make FFmpeg open anything else."""
    av = require("av")
    older: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(opened, mode="r", options={"protocol_whitelist": "none"}, **older)


def read_track(
    container: Any, label: str, to: float, max_seconds: float = MAX_SECONDS, origin: float | None = None
) -> Samples:
    """Decode the first audio track of an open PyAV container.

    Args:
        container: an open container that has an audio stream.
        label: how messages call the source.
        to: rate of the result, Hz.
        max_seconds: longer tracks are refused.
        origin: time in the container (seconds) that sample 0 stands for: what lies before it is dropped, a later
            start becomes silence. None: the track's own start.

    Returns:
        mono float32 [n], all finite. Holes in the time stamps are silence.

    Raises:
        MediaError: too long, or a rate that cannot be or changes. PyAV's FFmpegError: broken data.
    """
    return _gather(_track_blocks(container, label, max_seconds, origin), label, max_seconds, to)


def _track_blocks(
    container: Any, label: str, max_seconds: float, origin: float | None
) -> Iterator[tuple[Samples, float]]:
    track = container.streams.audio[0]
    rate = 0.0
    position = 0  # samples emitted
    if track.codec_context is not None:
        _check_channels(track.codec_context.channels, label)
    for frame in container.decode(track):
        rate = rate or float(frame.sample_rate)
        if rate != frame.sample_rate:
            raise MediaError(f"{label} changes its rate from {rate:g} to {frame.sample_rate} Hz; re-encode it")
        _check_rate(rate, label)
        _check_channels(frame.layout.nb_channels, label)
        block = _frame_samples(frame)
        if frame.time is not None:
            origin = frame.time if origin is None else origin
            start = round((frame.time - origin) * rate)
            if position == 0 and start < 0:
                block = block[-start:]
            elif start - position > (GAP * rate if position else 0):
                _check_length(start, rate, max_seconds, label)
                for at in range(position, start, READ_BLOCK):
                    yield np.zeros(min(READ_BLOCK, start - at), np.float32), rate
                position = start
        position += block.shape[0]
        yield block, rate


def _frame_samples(frame: Any) -> Samples:
    """One decoded audio frame as mono float32. Packed frames come as [1, n * channels], planar as [channels, n]."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    return _mono(values)
