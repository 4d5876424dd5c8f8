"""A live clip: sound, pictures or both, encoded piece by piece while they arrive, laid out as a whole clip is."""

from __future__ import annotations

import math
from collections import deque
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import AudioFrontend, Manifest
from ..errors import MediaError
from ..media.audio import ResampleStream
from ..media.image import Pixels, VisionInput, video_input
from ..media.limits import VisionLimits, video_size
from ..media.log_mel import LogMelStream, MelBlock, audio_tokens, pad_chunk, require_tokens
from .positions import Layout, SoundVideo, fresh_key, grid_positions, video_times

Floats = NDArray[np.float32]

#: a frame whose time stamp was rounded up by less than this is on show at its instant (seconds), see ``video``
_ROUNDING = 1e-3


class MediaEncoders(Protocol):
    """What turns media into embeddings (`omniport.runtime.generation.encoders.Encoders`)."""

    def audio(self, chunks: Floats, frames: NDArray[np.int64]) -> Floats:
        """Embeddings [n, H] of chunks float32 [C, n_mels, chunk_frames] with ``frames`` int64 [C] valid ones each."""

    def vision(self, vision: VisionInput) -> Floats:
        """Embeddings [T*N/4, H] of pictures."""


class _Tokens:
    """Embeddings of one medium as they come, and the indices of those that are laid out."""

    def __init__(self) -> None:
        self.embeds: Floats | None = None
        self.indices = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return 0 if self.embeds is None else len(self.embeds)

    def extend(self, embeds: Floats) -> None:
        self.embeds = embeds if self.embeds is None else np.concatenate([self.embeds, embeds])


class LiveSound(_Tokens):
    """A recording in progress: resampled, log-mel, encoded whenever a chunk of 2 s is complete.

    Args:
        keep: remember the mel of every chunk, so that ``correct`` can encode again.
    """

    def __init__(self, frontend: AudioFrontend, rate: float, encoders: MediaEncoders, keep: bool) -> None:
        super().__init__()
        self.rate = rate
        self._frontend = frontend
        self._encoders = encoders
        self._resample = ResampleStream(rate, frontend.sampling_rate)
        self._mel = LogMelStream(frontend)
        self._kept: list[tuple[MelBlock, slice]] | None = [] if keep else None
        self._samples = 0

    def require(self, samples: int) -> None:
        """MediaError if ``samples`` more would make it too long."""
        seconds = (self._samples + samples) / self.rate
        if seconds > self._frontend.max_seconds:
            raise MediaError(
                f"this sound is {seconds:.1f} s long, at most {self._frontend.max_seconds:g} s are taken: commit the "
                "turn, or push text to begin another clip"
            )

    @property
    def frames(self) -> int:
        """Mel frames if the clip ended now."""
        return self.frames_with(0)

    def frames_with(self, more: int) -> int:
        """Mel frames if the clip ended after so many samples more."""
        samples = math.ceil((self._samples + more) * self._frontend.sampling_rate / self.rate)
        return -(-samples // self._frontend.hop_length)

    def push(self, samples: Floats) -> None:
        """Take samples float32 [n] at ``rate``."""
        self._samples += len(samples)
        self._encode(self._mel.push(self._resample.push(samples)))

    def finish(self) -> None:
        """No more will come."""
        self._encode(self._mel.push(self._resample.finish()) + self._mel.finish())

    def correct(self) -> slice | None:
        """Encode again what the clip's own floor changes; gives the tokens from the first to the last that changed."""
        changed = [(block, part) for block, part in self._kept or [] if block.changes(self._mel.peak)]
        if not changed or self.embeds is None:
            return None
        self.embeds = self.embeds.copy()
        for block, part in changed:
            self.embeds[part] = self._embed(block, self._mel.peak)
        return slice(changed[0][1].start, changed[-1][1].stop)

    def _encode(self, blocks: list[MelBlock]) -> None:
        for block in blocks:
            embeds = self._embed(block, block.peak)
            if self._kept is not None and len(embeds):
                self._kept.append((block, slice(len(self), len(self) + len(embeds))))
            if len(embeds):
                self.extend(embeds)

    def _embed(self, block: MelBlock, peak: float) -> Floats:
        mel = block.mel(peak)
        if not audio_tokens(mel.shape[1]):  # one or two frames at the end
            return np.zeros((0, 0), np.float32)
        return self._encoders.audio(pad_chunk(mel, self._frontend)[None], np.asarray([mel.shape[1]], np.int64))


class LivePictures(_Tokens):
    """Frames in progress: the one on show at 0, 1/fps, 2/fps, ... seconds is kept, every two of those are encoded.

    Attributes:
        grid: int64 [3, n], positions of the tokens from 0.
        first, last: times of the first and the last frame, seconds.
    """

    def __init__(self, manifest: Manifest, encoders: MediaEncoders) -> None:
        super().__init__()
        self.grid = np.zeros((3, 0), np.int64)
        self.first = self.last = 0.0
        self._manifest = manifest
        self._encoders = encoders
        self._step = 1.0 / manifest.vision.video_fps
        self._origins: tuple[float, ...] = ()
        self._settled = False
        self._frames: deque[tuple[float, Pixels]] = deque()
        self._pushed = 0
        self._picked: list[Pixels] = []
        self._instants = 0
        self._grids = 0

    def require(self, pixels: Pixels, time: float, origin: float, sounding: bool) -> None:
        """MediaError if this frame cannot follow."""
        if self._pushed and time <= self.last:
            raise MediaError(f"a frame at {time:g} s follows one at {self.last:g} s; times must increase")
        if self._frames and pixels.shape != self._frames[0][1].shape:
            (height, width), (h, w) = pixels.shape[:2], self._frames[0][1].shape[:2]
            raise MediaError(
                f"a frame of {width}x{height} pixels follows one of {w}x{h}; resize it: one clip, one size"
            )
        vision = self._manifest.vision
        video_size(pixels.shape[0], pixels.shape[1], vision.temporal_patch_size, vision, VisionLimits())
        start = self._origins[0] if self._settled else self.first if self._pushed else time
        self.require_span(time, origin if sounding else start)

    def require_span(self, time: float, origin: float) -> None:
        """MediaError if a frame at ``time`` is too far into a clip that starts at ``origin``."""
        limit = self._manifest.vision.video_max_frames * self._step
        if not origin - limit <= time <= origin + limit:
            raise MediaError(
                f"a frame at {time:g} s belongs to a clip that starts at {origin:g} s; at most {limit:g} s are taken. "
                "Times are seconds from the start of the turn, on the clock of its sound. Commit the turn, or push "
                "text to begin another clip"
            )

    def tokens_with(self, frame: tuple[Pixels, float] | None, origin: float) -> int:
        """Tokens at most, if the clip ended now or after this frame, and started at ``origin`` or with a frame."""
        pixels, last = frame or (self._frames[0][1], self.last)
        vision, pushed = self._manifest.vision, self._pushed + (frame is not None)
        first = self.first if self._pushed else last
        start = self._origins[0] if self._settled else min(first, origin)
        usual = (last - first) / (pushed - 1) if pushed > 1 else self._step
        instants = max(self._instants, 1, math.ceil((last - start + usual) / self._step - 0.01))
        depth = vision.temporal_patch_size
        height, width = video_size(pixels.shape[0], pixels.shape[1], depth, vision, VisionLimits())
        return -(-instants // depth) * (height * width // (vision.patch_size * vision.merge_size) ** 2)

    def push(self, pixels: Pixels, time: float, origin: float) -> None:
        """Take a frame uint8 [H, W, 3]; ``origin`` is where the clip starts if it has sound."""
        if not self._pushed:
            self.first, self._origins = time, self._origins or (origin, time)
        elif self._pushed > 1 and not any(self._due(time, o) > self._due(self.last, o) for o in self._origins):
            self._frames.pop()  # the last one was on show at no instant
        self._frames.append((time, pixels))
        self.last = time
        self._pushed += 1
        self._pick()

    def settle(self, origin: float) -> None:
        """The clip starts at ``origin`` seconds. What was settled stays."""
        if not self._settled:
            self._origins, self._settled = (origin,), True
        self._pick()

    @property
    def next_time(self) -> int:
        """Time position of the tokens that follow."""
        return int(self._times(self._grids + 1)[-1])

    def finish(self) -> None:
        """No more will come. As with a file that stores no duration, the last frame stays as long as frames do."""
        usual = (self.last - self.first) / (self._pushed - 1) if self._pushed > 1 else self._step
        duration = self.last - self._origins[0] + usual
        for _ in range(self._instants, max(1, math.ceil(duration / self._step - 0.01))):
            self._show()
        depth = self._manifest.vision.temporal_patch_size
        if self._picked:
            self._picked += [self._picked[-1]] * (depth - len(self._picked))
        self._encode()

    def _due(self, time: float, origin: float) -> int:
        """Instants before a frame at ``time`` comes on show."""
        return max(0, math.ceil((time - origin - _ROUNDING) / self._step))

    def _pick(self) -> None:
        """Take what is on show at every instant that a later frame has passed for good."""
        margin = max(_ROUNDING, 0.01 * self._step)
        while self._settled and self.last - self._origins[0] > self._instants * self._step + margin:
            self._show()
        self._encode()

    def _show(self) -> None:
        while len(self._frames) > 1 and self._due(self._frames[1][0], self._origins[0]) <= self._instants:
            self._frames.popleft()
        self._picked.append(self._frames[0][1])
        self._instants += 1

    def _encode(self) -> None:
        vision = self._manifest.vision
        depth = vision.temporal_patch_size
        while len(self._picked) >= depth:
            made = video_input(np.stack(self._picked[:depth]), vision)
            del self._picked[:depth]
            self._grids += 1
            grid = grid_positions((1, *made.grid_thw[1:]), self._times(self._grids)[-1:], vision.merge_size)
            self.extend(self._encoders.vision(made))
            self.grid = np.concatenate([self.grid, grid], axis=1)

    def _times(self, count: int) -> NDArray[np.int64]:
        depth = self._manifest.vision.temporal_patch_size
        return video_times(count, depth * self._step, self._manifest)


class LiveClip:
    """One clip of a turn.

    What it is, sound, pictures or both, is what it holds when its first 2 s are complete. A clip with sound starts with
    its first sample, one without with its first frame.

    Args:
        layout: where to.
        origin: seconds of sound that were pushed before.
        exact: on ``close``, encode again what the clip's own floor changes.
    """

    def __init__(self, layout: Layout, encoders: MediaEncoders, origin: float, exact: bool) -> None:
        self._layout = layout
        self._manifest = layout.manifest
        self._encoders = encoders
        self._origin = origin
        self._exact = exact
        self._sound: LiveSound | None = None
        self._pictures: LivePictures | None = None
        self._kind: Literal["audio", "video", "both"] | None = None
        self._start = 0
        self._both: SoundVideo | None = None

    def takes(self, medium: Literal["audio", "video"]) -> bool:
        """False if this clip has turned out to hold the other medium alone."""
        return self._kind in (None, medium, "both")

    def require_sound(self, samples: int, rate: float) -> None:
        """MediaError if so many samples at this rate cannot follow."""
        sound = self._sound
        if sound is None:
            sound = LiveSound(self._manifest.audio, rate, self._encoders, self._exact)
        if rate != sound.rate:
            raise MediaError(
                f"sound at {rate:g} Hz follows sound at {sound.rate:g} Hz in one clip; push one rate, or text between"
            )
        sound.require(samples)
        if self._sound is None and self._pictures is not None:
            self._pictures.require_span(self._pictures.last, self._origin)

    def require_picture(self, pixels: Pixels, time: float) -> None:
        """MediaError if this frame cannot follow."""
        pictures = LivePictures(self._manifest, self._encoders) if self._pictures is None else self._pictures
        pictures.require(pixels, time, self._origin, self._sound is not None)

    def push_sound(self, samples: Floats, rate: float) -> None:
        """Take samples float32 [n] that ``require_sound`` has let pass."""
        if self._sound is None:
            self._sound = LiveSound(self._manifest.audio, rate, self._encoders, self._exact)
        self._sound.push(samples)
        self._advance()

    def push_picture(self, pixels: Pixels, time: float) -> None:
        """Take a frame uint8 [H, W, 3] that ``require_picture`` has let pass."""
        if self._pictures is None:
            self._pictures = LivePictures(self._manifest, self._encoders)
        self._pictures.push(pixels, time, self._origin)
        self._advance()

    def require_tokens(self) -> None:
        """MediaError if this is a sound too short for a token."""
        if self._pictures is None and self._sound is not None:
            require_tokens(self._sound.frames, self._manifest.audio)

    def waiting(self, samples: int = 0, rate: float = 0.0, frame: tuple[Pixels, float] | None = None) -> int:
        """Tokens at most that are not laid out yet, were the clip to end after these samples or this frame."""
        sound, pictures, count = self._sound, self._pictures, 4  # what begins and ends it
        if sound is None and samples:
            sound = LiveSound(self._manifest.audio, rate, self._encoders, self._exact)
        if sound is not None:
            count += audio_tokens(sound.frames_with(samples)) + 1 - len(sound.indices)
        if pictures is None and frame is not None:
            pictures = LivePictures(self._manifest, self._encoders)
        if pictures is not None:
            origin = self._origin if sound is not None else math.inf
            count += pictures.tokens_with(frame, origin) - len(pictures.indices)
        return count

    def close(self) -> tuple[NDArray[np.int64], Floats] | None:
        """No more will come: lay out the rest. Gives the tokens whose embeddings an ``exact`` clip has changed."""
        sound, pictures = self._sound, self._pictures
        if sound is not None:
            sound.finish()
        if pictures is not None:
            pictures.settle(pictures.first)
            pictures.finish()
        changed = sound.correct() if sound is not None else None
        self._open(ended=True)
        self._lay(ended=True)
        self._end()
        if changed is None or sound is None or sound.embeds is None:
            return None
        return sound.indices[changed], sound.embeds[changed]

    def _advance(self) -> None:
        if self._kind is None and self._sound is not None and self._pictures is not None:
            self._pictures.settle(self._origin)
        self._open(ended=False)
        self._lay(ended=False)

    def _open(self, ended: bool) -> None:
        """Decide what the clip is, once its first piece is there."""
        sound, pictures, tokens = self._sound, self._pictures, self._manifest.tokens
        if self._kind is not None:
            return
        if sound is not None and len(sound):
            self._kind = "audio" if pictures is None else "both"
        elif pictures is not None and (ended or (sound is None and self._piece_seen(pictures))):
            self._kind = "video"
            pictures.settle(pictures.first)
        if self._kind == "both":
            self._both = SoundVideo(self._layout)
        elif self._kind is not None:
            self._layout.control(tokens.audio_bos if self._kind == "audio" else tokens.vision_bos)
        self._start = self._layout.cursor

    def _piece_seen(self, pictures: LivePictures) -> bool:
        return pictures.last - pictures.first > self._manifest.seconds_per_chunk

    def _lay(self, ended: bool) -> None:
        """Lay out the pieces that are complete."""
        sound, pictures, tokens = self._sound, self._pictures, self._manifest.tokens
        if self._both is not None and pictures is not None and sound is not None:
            next_time = None if ended else pictures.next_time
            for piece in self._both.advance(pictures.grid, next_time, len(sound), ended):
                self._fill(pictures if piece.kind == "video" else sound, piece.part, piece.indices)
        elif self._kind == "audio" and sound is not None:
            part = slice(len(sound.indices), len(sound))
            if part.stop > part.start:
                self._fill(sound, part, self._layout.line(np.full(part.stop - part.start, tokens.audio)))
        elif self._kind == "video" and pictures is not None:
            part = slice(len(pictures.indices), len(pictures))
            if part.stop > part.start:
                positions = self._start + pictures.grid[:, part]
                self._fill(pictures, part, self._layout.add(np.full(positions.shape[1], tokens.video), positions))

    def _end(self) -> None:
        tokens = self._manifest.tokens
        if self._both is not None:
            self._both.close()
        elif self._kind is not None:
            self._layout.control(tokens.audio_eos if self._kind == "audio" else tokens.vision_eos)

    def _fill(self, medium: _Tokens, part: slice, indices: NDArray[np.int64]) -> None:
        assert medium.embeds is not None
        medium.indices = np.concatenate([medium.indices, indices])
        self._layout.fill(indices, medium.embeds[part], fresh_key())
