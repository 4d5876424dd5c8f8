"""Log-mel features of a whole or live clip, and how they are cut into encoder chunks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AudioFrontend
from ..errors import MediaError

Samples = NDArray[np.float32]

#: log10 of power under the loudest frame of the clip is cut off this far below it
_RANGE = 8.0


def _hz_to_mel(hz: float) -> float:
    # Slaney's scale (Auditory Toolbox, 1998): linear to 1 kHz (15 mel), then 27 steps per factor of 6.4.
    return hz * 0.015 if hz < 1000.0 else 15.0 + 27.0 * math.log(hz / 1000.0) / math.log(6.4)


@functools.lru_cache(maxsize=4)
def mel_filters(n_mels: int, n_fft: int, sampling_rate: int) -> NDArray[np.float64]:
    """Triangular Slaney filters of equal area from 0 Hz to half the rate: float64 [n_mels, n_fft // 2 + 1]."""
    mel = np.linspace(0.0, _hz_to_mel(sampling_rate / 2), n_mels + 2)
    edges = np.where(mel < 15.0, mel / 0.015, 1000.0 * np.exp((mel - 15.0) * (math.log(6.4) / 27.0)))
    bins = np.arange(n_fft // 2 + 1) * (sampling_rate / n_fft)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    filters: NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0.0, None) * (2.0 / (high - low))
    filters.flags.writeable = False
    return filters


@dataclass(frozen=True, eq=False)
class MelBlock:
    """Consecutive frames of a clip, as many as an encoder chunk has, fewer at the clip's end.

    Attributes:
        power: float64 [n, n_mels], log10 of mel power without the floor.
        peak: largest value up to the end of this block.
    """

    power: NDArray[np.float64]
    peak: float

    def mel(self, peak: float) -> Samples:
        """Features float32 [n_mels, n] under the floor that a clip with this peak has."""
        floored = (np.maximum(self.power, peak - _RANGE) + 4.0) / 4.0
        return np.ascontiguousarray(floored.T, dtype=np.float32)

    def changes(self, final: float) -> bool:
        """True if the floor of ``final``, at or above this block's own peak, gives other features."""
        return final > self.peak and bool(self.power.min() < final - _RANGE)


class LogMelStream:
    """Whisper log-mel of one clip while its samples arrive: the same blocks, bit for bit, however they are cut.

    Follows transformers' WhisperFeatureExtractor under Qwen2.5-Omni's settings, where the clip is followed by zeros up
    to ``max_seconds``: reflection at the start only, zeros after the end. A clip that fills the limit is reflected at
    its end as well. The floor (maximum of the clip - 8) also looks at the frames past the end that still see the clip;
    it is the one thing that is not known before the clip has ended, so blocks come without it.

    Attributes:
        peak: log10 power of the loudest frame so far; after ``finish``, of the clip.
    """

    def __init__(self, frontend: AudioFrontend) -> None:
        self._frontend = frontend
        self._half = frontend.n_fft // 2
        self._limit = max(round(frontend.max_seconds * frontend.sampling_rate), frontend.n_fft)
        self._signal = np.zeros(0)
        """padded samples [m] from frame ``_frame`` on; before the left padding can be made, samples from the start"""
        self._padded = False
        self._frame = 0
        self.samples = 0
        self.peak = -math.inf

    def push(self, samples: Samples) -> list[MelBlock]:
        """Take samples float32 [n], finite, at ``frontend.sampling_rate``; gives the blocks that they complete.

        Raises:
            MediaError: the clip would be longer than ``frontend.max_seconds``; nothing is taken.
        """
        frontend = self._frontend
        if self.samples + samples.shape[0] > frontend.max_seconds * frontend.sampling_rate:
            seconds = (self.samples + samples.shape[0]) / frontend.sampling_rate
            raise MediaError(
                f"audio is too long: {seconds:.1f} s or more, at most {frontend.max_seconds:g} s are taken; "
                "cut it into shorter clips"
            )
        self.samples += samples.shape[0]
        self._append(samples)
        # Frame t sees the samples before t * hop + half.
        final = (self.samples - self._half) // frontend.hop_length + 1
        size = frontend.chunk_frames
        return [self._block(size) for _ in range((final - self._frame) // size)] if self._padded else []

    def finish(self) -> list[MelBlock]:
        """The clip has ended: gives the frames that are left."""
        hop, n_fft, size = self._frontend.hop_length, self._frontend.n_fft, self._frontend.chunk_frames
        frames = -(-self.samples // hop)
        if not frames:
            return []
        clip = min(self._limit, frames * hop + n_fft)
        self._append(np.zeros(clip - self.samples))
        self._signal = np.concatenate([self._signal, self._signal[-2 : -2 - self._half : -1]])
        total = min(frames + -(-self._half // hop), self._limit // hop)
        blocks = []
        while self._frame < total:
            first = self._frame
            block = self._block(min(size, total - first))
            if first < frames:
                blocks.append(MelBlock(block.power[: frames - first], block.peak))
        return blocks

    def _append(self, samples: NDArray[np.floating]) -> None:
        self._signal = np.concatenate([self._signal, samples.astype(np.float64)])
        if not self._padded and self._signal.shape[0] > self._half:
            self._signal = np.concatenate([self._signal[self._half : 0 : -1], self._signal])
            self._padded = True

    def _block(self, count: int) -> MelBlock:
        """The next ``count`` frames, whose samples are all there."""
        frontend = self._frontend
        hop, n_fft = frontend.hop_length, frontend.n_fft
        windows = np.lib.stride_tricks.sliding_window_view(self._signal[: (count - 1) * hop + n_fft], n_fft)[::hop]
        hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(n_fft) / n_fft)  # periodic
        spectrum = np.fft.rfft(windows * hann)
        power = (spectrum.real**2 + spectrum.imag**2) @ mel_filters(frontend.n_mels, n_fft, frontend.sampling_rate).T
        power = np.log10(np.maximum(power, 1e-10))
        self._signal = self._signal[count * hop :].copy()
        self._frame += count
        self.peak = max(self.peak, float(power.max()))
        return MelBlock(power, self.peak)


def log_mel(samples: Samples, frontend: AudioFrontend) -> Samples:
    """Whisper log-mel spectrogram of a whole clip, float32 [n_mels, ceil(n / hop_length)]; see ``LogMelStream``.

    Args:
        samples: float32 [n] at ``frontend.sampling_rate``, n >= 1.

    Raises:
        MediaError: wrong dimensions, no samples, NaN or infinite samples, or longer than ``frontend.max_seconds``.
    """
    if samples.ndim != 1 or samples.shape[0] == 0:
        raise MediaError(f"audio has shape {list(samples.shape)}; expected mono samples [n], n >= 1")
    if not np.isfinite(samples).all():
        raise MediaError("audio holds NaN or infinite samples; expected finite samples in -1..1")
    stream = LogMelStream(frontend)
    blocks = stream.push(samples) + stream.finish()
    return np.concatenate([block.mel(stream.peak) for block in blocks], axis=1)


def audio_tokens(frames: int) -> int:
    """Embeddings that the audio encoder gives for one clip of ``frames`` mel frames: stride-2 conv, then pooling by 2.

    Clips of one or two frames give none.
    """
    return max(0, ((frames - 1) // 2 - 1) // 2 + 1)


def require_tokens(frames: int, frontend: AudioFrontend) -> None:
    """MediaError unless a clip of ``frames`` mel frames gives at least one token."""
    if audio_tokens(frames) == 0:
        hop_ms = 1000.0 * frontend.hop_length / frontend.sampling_rate
        raise MediaError(
            f"audio is too short: {frames} mel frames ({frames * hop_ms:g} ms), "
            f"at least 3 ({3 * hop_ms:g} ms) are needed for one audio token; record a longer clip"
        )


def pad_chunk(mel: Samples, frontend: AudioFrontend) -> Samples:
    """One encoder chunk float32 [n_mels, chunk_frames] from at most that many frames, zero padded."""
    padded = np.zeros((frontend.n_mels, frontend.chunk_frames), np.float32)
    padded[:, : mel.shape[1]] = mel
    return padded


def chunk_mel(mel: Samples, frontend: AudioFrontend) -> tuple[Samples, NDArray[np.int64]]:
    """Cut one clip's mel into encoder chunks.

    Args:
        mel: float32 [n_mels, frames].

    Returns:
        chunks float32 [C, n_mels, chunk_frames], the last one zero padded, and frames int64 [C], the valid ones.

    Raises:
        MediaError: wrong dimensions, or too short for one embedding (see ``audio_tokens``).
    """
    if mel.ndim != 2 or mel.shape[0] != frontend.n_mels:
        raise MediaError(f"mel has shape {list(mel.shape)}; expected [{frontend.n_mels}, frames]")
    frames, size = mel.shape[1], frontend.chunk_frames
    require_tokens(frames, frontend)
    starts = range(0, frames, size)
    chunks = np.stack([pad_chunk(mel[:, start : start + size], frontend) for start in starts])
    return chunks, np.asarray([min(size, frames - start) for start in starts], np.int64)
