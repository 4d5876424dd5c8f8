"""Turn codec tokens into sound: the flow-matching DiT makes a mel spectrogram, the vocoder makes samples.

``whole`` solves all codes at once, as the reference does. ``stream`` solves windows: each new chunk with the codes the
DiT's block attention looks ahead to, aligned to its blocks, over noise that belongs to absolute positions. What it
looks back at was kept (`kept_blocks`); with a bundle before schema version 3 it is solved again. Mel frames of the
look-ahead serve as the vocoder's right context and are solved again, in full context, by the next window.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend
from ..bundle.manifest import SolverSpec
from ..bundle.reader import Bundle, Voice
from ..concurrency.timing import Pace, StageTimer
from ..errors import BundleError, OmniportError, UsageError
from .kept_blocks import KeptBlocks, nothing_before
from .ode import solve
from .ode_methods import SolverChoice
from .solver_choice import SHARE, candidates, evaluations, name_of
from .windows import Window, again_before, checked_windows, vocoder_lengths, window_codes

if TYPE_CHECKING:
    from .ode_methods import Velocity

_NOISE_BLOCK = 24
#: the first window is short: what every evaluation costs besides weighs more in it
_FIRST_ESTIMATE = 1.5


class NoiseStream:
    """The ODE's starting noise by absolute mel frame, the same however it is asked for.

    Args:
        noise: [T, mel_dim] to use as it is; drawn from ``rng`` if None.
        rng: source of noise.
        mel_dim: mel channels.

    Raises:
        UsageError: not a finite real array of that width.
    """

    def __init__(self, noise: NDArray[Any] | None, rng: np.random.Generator, mel_dim: int) -> None:
        self._given = noise is not None
        self._rng = rng
        self._mel_dim = mel_dim
        if noise is None:
            self._noise = np.zeros((0, mel_dim), np.float32)
            return
        array = np.asarray(noise)
        if array.ndim != 2 or array.shape[1] != mel_dim or array.dtype.kind != "f":
            raise UsageError(
                f"noise is {array.dtype} {list(array.shape)}; float32 [T, {mel_dim}] was expected, with T at "
                "least 2 for every codec token"
            )
        if not np.isfinite(array).all():
            raise UsageError("noise holds NaN or infinity; finite values were expected")
        self._noise = np.ascontiguousarray(array, np.float32)

    def frames(self, start: int, stop: int) -> NDArray[np.float32]:
        """Noise of mel frames ``start`` to ``stop``: float32 [stop - start, mel_dim].

        Raises:
            UsageError: a given array ends before ``stop``.
        """
        if stop > len(self._noise):
            if self._given:
                raise UsageError(
                    f"noise has {len(self._noise)} mel frames; the speech needs at least {stop}. Give a longer "
                    "array, or limit the talker's max_new_tokens"
                )
            # Fixed-size draws: the generator's stream does not depend on the windows.
            draws = -(-(stop - len(self._noise)) // _NOISE_BLOCK)
            blocks = [self._rng.standard_normal((_NOISE_BLOCK, self._mel_dim), dtype=np.float32) for _ in range(draws)]
            self._noise = np.concatenate([self._noise, *blocks])
        return self._noise[start:stop]


@dataclass(frozen=True, eq=False)
class MelPiece:
    """One window on its way to the vocoder.

    Attributes:
        mel: float32 [n, mel_dim], with the context around the window.
        skip, count: frames before the window, and in it.
    """

    mel: NDArray[np.float32]
    skip: int
    count: int


class Token2Wav:
    """Turns the codes of one utterance into samples as they come.

    Every sample comes out exactly once and in order: ``repeats * hop`` samples a code.

    Args:
        window: ``stream``, ``whole``, or other windows. ``stream`` is ``SpeechWindows()``, with longer windows on a CPU
            that is behind.
        solver: of the ODE, see `omniport.runtime.speech.ode_methods`; ``auto``: see `solver_choice`.
        pace: of the reply before, by which ``auto`` chooses; this one's takes its place.

    Raises:
        BundleError: the bundle does not speak.
        UsageError: an unknown window or solver, or one that does not fit this bundle's DiT.
    """

    def __init__(
        self,
        backend: Backend,
        bundle: Bundle,
        voice: Voice,
        noise: NoiseStream,
        *,
        window: Window = "stream",
        solver: SolverChoice = "rk4",
        timer: StageTimer | None = None,
        pace: Pace | None = None,
    ) -> None:
        manifest = bundle.manifest
        if manifest.dit is None or manifest.vocoder is None or manifest.solver is None:
            raise BundleError(f"{bundle.root} has no DiT and vocoder: it was exported from a checkpoint without speech")
        self._backend = backend
        self._dit, self._vocoder = manifest.dit, manifest.vocoder
        self._streaming = window != "whole"
        self._candidates = candidates(manifest.solver, solver, self._streaming)
        self._solver = self._candidates[0]
        self._pace = Pace() if pace is None else pace
        self._voice = voice.feeds()
        self._noise = noise
        self._timer = StageTimer() if timer is None else timer
        keeps = self._streaming and self._dit.past_layers and self._dit.look_back_blocks
        self._kept = KeptBlocks(self._dit) if keeps else None
        self._windows, self._context = checked_windows(
            window, self._dit, self._vocoder, shared=all(map(backend.shares_cores, ("dit", "bigvgan")))
        )
        # A GPU prepares itself for every new length, so the last window is made as long as one of the others.
        gpu = self._streaming and not backend.shares_cores("bigvgan")
        self._lengths = vocoder_lengths(self._windows, self._context, self._dit) if gpu else ()
        self._quickest = math.inf  # seconds that the quickest evaluation so far took for a code
        self._quickest_frame = math.inf  # seconds that the vocoder's quickest run so far took for a mel frame
        self._codes: list[int] = []
        self._done = 0  # codes whose samples are out
        self._emitted = 0
        # Final mel frames [n, 80] before the next chunk: what its samples can depend on, or makes up a length.
        self._tail = np.zeros((0, self._dit.mel_dim), np.float32)
        # How the vocoder went on behind the last window, by frames that the next one solves anew: [n] samples.
        self._foreseen = np.zeros(0, np.float32)

    def push(self, code: int) -> list[NDArray[np.float32]]:
        """Take one code; gives the sample arrays float32 [n] that it completes, often none: ``mels`` and ``vocode``."""
        return [self.vocode(piece) for piece in self.mels(code)]

    def finish(self) -> list[NDArray[np.float32]]:
        """No more codes: gives the samples of all that are left."""
        return [self.vocode(piece) for piece in self.last_mels()]

    def mels(self, code: int) -> list[MelPiece]:
        """Take one code; gives the windows that it completes, solved, often none.

        Raises:
            OmniportError: the code is no sound: outside the DiT's codebook.
            UsageError: the given noise is too short.
        """
        # The codebook has one more row than num_embeds (DiTCodecEmbedding).
        if not 0 <= code <= self._dit.num_embeds:
            raise OmniportError(
                f"the talker gave codec token {code}, which the DiT's codebook of {self._dit.num_embeds + 1} has no "
                "sound for; the talker's weights do not belong to this DiT. Check the checkpoint and export it again"
            )
        self._codes.append(code)
        ready = []
        while self._streaming and len(self._codes) >= self._done + self._chunk + self._dit.look_ahead_codes:
            ready.append(self._emit(self._done + self._chunk))
        return ready

    def last_mels(self) -> list[MelPiece]:
        """No more codes: gives the last window."""
        return [self._emit(len(self._codes))] if self._done < len(self._codes) else []

    def vocode(self, piece: MelPiece) -> NDArray[np.float32]:
        """Samples float32 [n] of a window; windows come in their order. It may run beside ``mels``.

        The frames behind a window are solved again with more codes to come, a little otherwise, so its sound would step
        where the next one begins. Over half a frame the next one therefore goes over from how this one went on.
        """
        samples, behind = self._synthesize(piece.mel, piece.skip, piece.count)
        foreseen = self._foreseen[: len(samples)]
        if count := len(foreseen):
            share = (np.arange(count, dtype=np.float32) + np.float32(0.5)) / np.float32(count)
            samples[:count] = foreseen + share * (samples[:count] - foreseen)
        self._foreseen = behind[: self._vocoder.hop // 2]
        return samples

    def release(self) -> None:
        """Free what windows leave to each other, once nothing more is said.

        Objects of a reply know each other in circles, so that they wait for the garbage collector, which counts them
        and not their bytes.
        """
        if self._kept is not None:
            self._kept.clear()

    @property
    def solver(self) -> str:
        """The name of the one in use."""
        return name_of(self._solver)

    @property
    def longest(self) -> int:
        """Codes that the longest window adds."""
        return max(*self._windows.chunks, self._windows.behind or 0)

    @property
    def first_window(self) -> tuple[int, float] | None:
        """Codes that the first sound takes, and the codes a second without which there is a gap after it, however fast
        all else is. None where all sound comes at once."""
        first, second = self._windows.chunks[0], self._windows.chunks[:2][-1]
        seconds = first / self._dit.codec_hz
        return (first + self._dit.look_ahead_codes, second / seconds) if self._streaming else None

    @property
    def _chunk(self) -> int:
        """Codes of the next window that are new."""
        chunks, behind = self._windows.chunks, self._windows.behind
        if behind is not None and self._emitted and self._is_behind(chunks[-1]):
            return behind
        return chunks[min(self._emitted, len(chunks) - 1)]

    def _is_behind(self, chunk: int) -> bool:
        """Whether solving and vocoding windows of ``chunk`` new codes takes longer than hearing them.

        By the quickest runs: others may have waited for weights that were read from disk.
        """
        doubt = _FIRST_ESTIMATE if self._emitted == 1 else 1.0
        seconds = self._work(self._solver, chunk, self._quickest, self._quickest_frame)
        return seconds > doubt * chunk / self._dit.codec_hz

    def _work(self, solver: SolverSpec, chunk: int, evaluation: float, frame: float) -> float:
        """Seconds of a window of ``chunk`` new codes, by those of a code's evaluation and of a frame's samples."""
        seconds = evaluation * evaluations(solver) * window_codes(chunk, self._dit)
        if math.isfinite(frame):  # the first window may not have been vocoded yet
            seconds += frame * (self._dit.repeats * chunk + 2 * self._context)
        return seconds

    def _in_time(self) -> SolverSpec:
        """The first candidate with which windows are done in time; the last one if there is none."""
        chunk, known = self._windows.chunks[-1], self._pace
        doubt = 1.0 if known.evaluation < self._quickest else _FIRST_ESTIMATE
        evaluation = min(known.evaluation, self._quickest)
        most = SHARE * doubt * chunk / self._dit.codec_hz
        in_time = (spec for spec in self._candidates if self._work(spec, chunk, evaluation, known.frame) <= most)
        return next(in_time, self._candidates[-1])

    def _emit(self, stop: int) -> MelPiece:
        """The mel of codes ``self._done`` to ``stop``."""
        start = self._done
        first, last = 0, len(self._codes)
        if self._streaming:
            first = max(0, start - again_before(self._dit))
            last = min(last, stop + self._dit.look_ahead_codes)
        mel = self._solve(first, last, stop)
        repeats, context = self._dit.repeats, self._context
        new = mel[(start - first) * repeats : (stop - first) * repeats]
        # one frame more: as much context for the samples behind the window, which `vocode` goes over from
        right = mel[(stop - first) * repeats :][: context + 1]
        least, most = min(context, len(self._tail)), len(self._tail)
        rest = len(new) + len(right)
        left = next((length - rest for length in self._lengths if least + rest <= length <= most + rest), least)
        piece = MelPiece(np.concatenate([self._tail[most - left :], new, right]), left, len(new))
        self._tail = np.concatenate([self._tail, new])[-max(context, *self._lengths, 1) :]
        self._done = stop
        self._emitted += 1
        return piece

    def _solve(self, first: int, last: int, stop: int) -> NDArray[np.float32]:
        """Mel frames [2 * (last - first), 80] of the codes from ``first`` to ``last``; the next window begins at
        ``stop``."""
        with self._timer("load"):
            graph = self._backend.graph("dit")
        repeats, kept = self._dit.repeats, self._kept
        feeds: dict[str, NDArray[Any]] = {
            "codes": np.asarray([self._codes[first:last]], np.int64),
            **self._voice,
            **nothing_before(self._dit),
        }
        keep_block = (stop - first - 1) // self._dit.block_codes
        evaluations = itertools.count()

        def velocity(step: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
            start, number = self._at_work(), next(evaluations)
            before = {} if kept is None else kept.feeds(number, keep_block)
            outputs = graph.run({**feeds, **before, "x": x, "step": np.asarray([step], np.int64)})
            if kept is not None:
                kept.take(number, outputs)
            self._quickest = min(self._quickest, (self._at_work() - start) / (last - first))
            return outputs["velocity"]

        noise = self._noise.frames(first * repeats, last * repeats)[None]
        with self._timer("dit"):
            choose = len(self._candidates) > 1 and not self._emitted
            evaluate = self._chosen(velocity, noise) if choose else velocity
            mel: NDArray[np.float32] = solve(self._solver, evaluate, noise)[0]
        self._pace.evaluation = self._quickest
        _require_finite(mel, "the DiT's mel spectrogram")
        return mel

    def _chosen(self, velocity: Velocity, noise: NDArray[np.float32]) -> Velocity:
        """Choose the solver by the first evaluation, which is that of all; gives what need not evaluate it again."""
        begin = self._solver.stages[0][0]
        given = [velocity(begin, noise)]
        self._solver = self._in_time()
        assert self._solver.stages[0][0] == begin
        return lambda step, x: given.pop() if given else velocity(step, x)

    def _synthesize(
        self, mel: NDArray[np.float32], skip: int, count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Samples of ``count`` mel frames after the first ``skip``, and of those behind; ``mel``: [n, 80]."""
        with self._timer("load"):
            graph = self._backend.graph("bigvgan")
        hop = self._vocoder.hop
        with self._timer("bigvgan"):
            start = self._at_work()
            wave = graph.run({"mel": np.ascontiguousarray(mel.T[None])})["wav"].reshape(-1)
            self._quickest_frame = min(self._quickest_frame, (self._at_work() - start) / len(mel))
            self._pace.frame = self._quickest_frame
        if len(wave) != hop * len(mel):
            raise OmniportError(
                f"the vocoder gave {len(wave)} samples for {len(mel)} mel frames; {hop} a frame were expected. Export "
                "the bundle again"
            )
        samples, behind = wave[skip * hop : (skip + count) * hop].copy(), wave[(skip + count) * hop :].copy()
        _require_finite(samples, "the vocoder's waveform")
        return samples, behind

    def _at_work(self) -> float:
        """A clock that stands still while this thread waits for a slot: other replies must not change the windows."""
        return time.perf_counter() - self._timer.left_out


def _require_finite(array: NDArray[np.float32], what: str) -> None:
    if not np.isfinite(array).all():
        raise OmniportError(
            f"{what} holds {int((~np.isfinite(array)).sum())} of {array.size} values that are not finite; an overflow "
            "in FP16 is the usual cause: export with --precision fp32"
        )
