"""Predict for a device what fits, how fast it answers, and whether it speaks in real time.

Nothing is built and no weight is read. The model is written down in docs/plan.md, with the measurements that it is held
against: memory is counted, a decode step reads every weight once, and prefill multiplies them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace

from omniport.runtime.bundle.manifest import AudioFrontend, DitGeometry, VocoderGeometry
from omniport.runtime.bundle.parts import decoders, encoder_of, giving
from omniport.runtime.bundle.recipes import Scheme
from omniport.runtime.errors import UsageError
from omniport.runtime.generation.decoder import PREFILL_CHUNK
from omniport.runtime.generation.encoders import AUDIO_CHUNKS
from omniport.runtime.speech.kept_blocks import kept_bytes
from omniport.runtime.speech.windows import BEHIND_CODES, SpeechWindows, window_codes
from omniport.runtime.system.path_arguments import paths_checked

from ..devices.catalog import BUILD_CONSTANT, BUILD_FACTOR
from ..option_values import TOKEN2WAV_PRECISIONS
from ..tensorrt.builder_api import NATIVE_SINCE, too_old_for
from .machines import Machine, find_machines
from .shapes import DecoderShape, ModelShape, find_model
from .weights import RECIPES, GraphShape, Matrix, PlanRecipe, graph_bytes, itemsize, matrix_bytes

_DIT, _WINDOWS = DitGeometry(), SpeechWindows()
#: codec tokens a second of speech
CODES_PER_SECOND, FRAMES_PER_CODE = _DIT.codec_hz, _DIT.repeats
#: text tokens a second of speech: 150 words a minute of 1.6 tokens
TEXT_PER_SECOND = 4.0
#: tokens of a conversation when a question has ended, and those of them that are not prefilled yet
PROMPT, LATE = 256, 40
#: codes of the first window with its look-ahead
FIRST_CODES = _WINDOWS.chunks[0] + _DIT.look_ahead_codes
#: new codes of a later window; the second on a CPU whose DiT and vocoder are slower than the speech is heard
NEW_CODES, NEW_CODES_BEHIND = _WINDOWS.chunks[-1], BEHIND_CODES
#: mel frames around a window that the vocoder sees
VOCODER_CONTEXT = VocoderGeometry().context_frames
#: most rows of one call: new tokens, mel frames of 32 chunks (15 on a CPU: 30 s), patches of a 1024x768 image
PREFILL_ROWS, AUDIO_ROWS, AUDIO_ROWS_CPU = PREFILL_CHUNK, AUDIO_CHUNKS * AudioFrontend().chunk_frames, 3000
PATCHES = 3996
#: attention scores that a CPU holds at once, over their size: measured, with a picture
SCORES = 1.25
#: bytes of kernels and graph in an engine, over its weights (docs/results/build-matrix.md)
ENGINE_EXTRA = 8_000_000

#: recipes from the least to the most that they may lose
_LOSS = ("", "w8", "fp8", "edge-16gb", "int8", "int4", "edge-8gb")


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        weights: by graph, as the runtime holds them. mapped: token tables, read from their files row by row.
    """

    weights: Mapping[str, int]
    caches: int
    activations: int
    runtime: int
    mapped: int

    @property
    def total(self) -> int:
        """All that has to be in memory at once."""
        return sum(self.weights.values()) + self.caches + self.activations + self.runtime


@dataclass(frozen=True)
class Speed:
    """Predicted rates.

    Attributes:
        prefill: tokens a second, 512 at once. decode: text tokens a second at the planned context. codes: the talker's.
        first_token, first_audio: seconds after a spoken question has ended.
        speech: seconds of work for one second of speech.
        solver: that these two are of: the most exact one with which speech is made in time, or else the quickest.
    """

    prefill: float
    decode: float
    codes: float | None
    first_token: float
    first_audio: float | None
    speech: float | None
    _: KW_ONLY
    solver: str = ""

    @property
    def real_time(self) -> bool:
        """Whether speech is made faster than it is heard, all of its parts taking turns."""
        return self.speech is not None and self.speech <= 1.0 and (self.codes or 0) >= CODES_PER_SECOND


@dataclass(frozen=True)
class RecipePlan:
    """One recipe on one machine.

    Attributes:
        problem: why the machine cannot have it; memory and speed are None then.
        build_bytes: what building the largest graph takes; 0 where nothing is built.
    """

    recipe: PlanRecipe
    problem: str = ""
    _: KW_ONLY
    memory: Memory | None = None
    speed: Speed | None = None
    usable: int = 0
    build_bytes: int = 0
    builds: bool = False

    @property
    def fits(self) -> bool:
        """Whether everything is in memory at once."""
        return self.memory is not None and self.memory.total <= self.usable

    @property
    def works(self) -> bool:
        """Whether it can be built and run there."""
        return self.fits and self.builds


@dataclass(frozen=True)
class TargetPlan:
    """All recipes on one machine. ``best``: name of the one to take; empty if none works."""

    model: str
    machine: Machine
    context: int
    recipes: tuple[RecipePlan, ...]

    @property
    def best(self) -> str:
        """The recipe that loses least of those that speak in real time, or else the one that works least on speech."""
        working = [row for row in self.recipes if row.works]
        speaking = [row for row in working if row.speed is not None and row.speed.real_time]
        if speaking:
            return min(speaking, key=lambda row: (loss_of(row), load_of(row))).recipe.name
        return min(working, key=load_of).recipe.name if working else ""


@paths_checked
def plan(
    model: str | os.PathLike[str],
    target: str = "all",
    *,
    context: int = 4096,
    bandwidth: float | None = None,
    token2wav: str = "fp32",
) -> tuple[TargetPlan, ...]:
    """Predict memory and speed of a model on machines, by every recipe, without building anything.

    Args:
        model: a bundle, a checkpoint's folder, or ``3b`` or ``7b``, which need no files.
        target: name of a machine (``omniport targets``), ``this`` for the GPU in here, ``cpu`` or ``all``.
        context: tokens of the KV caches.
        bandwidth: bytes a second at which the machine's memory is read, where that was measured.
        token2wav: fp32 or fp16: precision of DiT and vocoder where the rest is FP16 or BF16.

    Returns:
        one plan for each machine.

    Raises:
        UsageError: no such model or target, or a context that the model has no room for.
        BundleError, CheckpointError: a bundle or checkpoint that cannot be read.
        BackendError: ``this`` where there is no GPU.
    """
    shape = find_model(os.fspath(model))
    return tuple(make_plan(shape, machine, context, token2wav) for machine in find_machines(target, bandwidth))


def make_plan(model: ModelShape, machine: Machine, context: int = 4096, token2wav: str = "fp32") -> TargetPlan:
    """Plan every recipe.

    Args:
        context: tokens of the KV caches.
        token2wav: fp32 or fp16: precision of DiT and vocoder where the rest is FP16 or BF16.

    Raises:
        UsageError: another precision; a context that is not positive, or longer than the model has positions for.
    """
    if not 1 <= context <= model.max_context:
        raise UsageError(f"--context {context}: 1 to {model.max_context} was expected, what {model.name} has room for")
    if token2wav not in TOKEN2WAV_PRECISIONS:
        raise UsageError(f"--token2wav {token2wav}: expected {' or '.join(TOKEN2WAV_PRECISIONS)}")
    recipes = [replace(recipe, token2wav=token2wav) for recipe in RECIPES.values()]
    rows = tuple(_plan(model, machine, recipe, context) for recipe in recipes)
    return TargetPlan(model.name, machine, context, rows)


def _plan(model: ModelShape, machine: Machine, recipe: PlanRecipe, context: int) -> RecipePlan:
    lacking = [need for need in recipe.needs if need not in machine.formats]
    if lacking:
        return RecipePlan(recipe, f"{machine.name} has no {', '.join(lacking)}")
    if machine.target is None and recipe.quantized is not None and recipe.quantized.activations:
        return RecipePlan(recipe, "ONNX Runtime has no CPU kernels that pay for it: w8 computes in integers as well")
    estimate = _Estimate(model, machine, recipe, context)
    largest = max(estimate.file_bytes(graph) for graph in model.graphs.values())
    build = int(BUILD_FACTOR * largest) + BUILD_CONSTANT if machine.target is not None else 0
    return RecipePlan(
        recipe,
        memory=estimate.memory(),
        speed=estimate.speed(),
        usable=machine.usable,
        build_bytes=build,
        builds=build <= machine.usable or not machine.builds_itself,
    )


def loss_of(row: RecipePlan) -> int:
    """Rank of what a recipe may lose; 0 for a precision."""
    return _LOSS.index(row.recipe.name) if row.recipe.quantized is not None else 0


def load_of(row: RecipePlan) -> float:
    """Seconds of work for a second of speech, or for a token where nothing is spoken."""
    assert row.speed is not None
    return row.speed.speech if row.speed.speech is not None else 1 / row.speed.decode


def kv_form(model: ModelShape, machine: Machine) -> str:
    """Form of the KV caches: the bundle's, or what an export for the machine takes.

    Of a board's JetPacks the oldest decides, whose graphs later ones take too. A cache that grows is there twice: a
    call reads it on one side and writes it on the other.
    """
    releases = () if machine.target is None else machine.target.jetpacks
    lowered = bool(releases) and bool(too_old_for(NATIVE_SINCE, 0, releases[0].tensorrt))
    return model.kv or ("concat" if lowered else "static")


@dataclass(frozen=True)
class _Estimate:
    """Memory and speed of one model on one machine by one recipe."""

    model: ModelShape
    machine: Machine
    recipe: PlanRecipe
    context: int

    def precision(self, graph: str) -> str:
        return self.recipe.graph_precision(graph, self.machine.precision)

    def itemsize(self, graph: str) -> int:
        return itemsize(self.precision(graph))

    def scheme(self, graph: str, matrix: Matrix) -> Scheme:
        return self.recipe.scheme(graph, matrix, self.precision(graph))

    # --- memory

    def file_bytes(self, shape: GraphShape) -> int:
        return graph_bytes(shape, self.recipe, self.precision(shape.name))

    def memory(self) -> Memory:
        weights = {name: self.held_bytes(shape) for name, shape in self.model.graphs.items()}
        # a CPU's caches are as wide as what it computes in; both decoders keep one, on two sides if it grows
        sides = 2 if kv_form(self.model, self.machine) == "concat" else 1
        held = sum(d.cache_elements(self.context) * self.itemsize(name) for name, d in self.model.decoders.items())
        caches = sides * held
        activations = sum(self.activations(shape) for shape in self.model.graphs.values())
        if self.model.speaks:  # what a window of speech leaves to the next
            activations += kept_bytes(self.model.dit, max(self.model.solvers.values()))
        return Memory(weights, caches, activations, self.machine.process, sum(self.model.embedding_bytes.values()))

    def held_bytes(self, shape: GraphShape) -> int:
        """Weights in memory: engines hold them as they are stored, ONNX Runtime in its packed layout."""
        if self.machine.target is not None:
            return self.file_bytes(shape) + ENGINE_EXTRA
        held = sum(self.held_matrix(shape.name, matrix) for matrix in shape.matrices)
        return held + shape.other * self.itemsize(shape.name) + shape.fixed * 4

    def held_matrix(self, graph: str, matrix: Matrix) -> int:
        scheme = self.scheme(graph, matrix)
        if scheme.bits in self.machine.packed:
            return int(matrix.elements * self.machine.packed[scheme.bits])
        return matrix_bytes(matrix, scheme, self.precision(graph))

    def activations(self, shape: GraphShape) -> int:
        """Values that live at once in the largest call of a graph; attention scores only where they are stored."""
        item, cpu = self.itemsize(shape.name), self.machine.target is None
        decoder = self.model.decoders.get(shape.name)
        if decoder is not None:
            rows = min(PREFILL_ROWS, self.context)
            scores = int(SCORES * decoder.heads * rows * self.context * 4) if cpu else 0
            values = rows * (3 * shape.ffn + 6 * shape.width) * item
            return values + scores + (decoder.vocabulary + rows * shape.width) * 4
        if shape.name == encoder_of("audio").name:
            rows = AUDIO_ROWS_CPU if cpu else AUDIO_ROWS
            scores = int(SCORES * shape.heads * rows / 2 * 100 * 4) if cpu else 0
            return (2 * rows * shape.width + rows // 2 * (2 * shape.ffn + 4 * shape.width)) * item + scores
        if shape.name == encoder_of("image").name:
            scores = int(SCORES * shape.heads * PATCHES**2 * 4) if cpu else 0
            return PATCHES * (3 * shape.ffn + 6 * shape.width) * item + scores
        new = NEW_CODES_BEHIND if cpu else NEW_CODES
        if shape.name == giving("velocity").name:
            frames = FRAMES_PER_CODE * window_codes(new, self.model.dit)
            return 2 * frames * (3 * shape.ffn + 8 * shape.width) * item
        # the widest stage of the vocoder, and its two phases
        widest = max((m.n * m.steps for m in shape.matrices), default=0)
        frames = FRAMES_PER_CODE * new + 2 * VOCODER_CONTEXT
        return int(frames * widest * 2 * 4 * item)

    # --- time

    def speed(self) -> Speed:
        thinker, listening = decoders()[0].name, encoder_of("audio").name
        decode = self.run(thinker, 1, self.context)
        rows = min(PREFILL_ROWS, self.context)
        late = self.run(listening, 200) if listening in self.model.graphs else 0.0
        late += self.run(thinker, LATE, PROMPT)
        first = late + self.run(thinker, 1, PROMPT)
        prefill = rows / self.run(thinker, rows, rows)
        if not self.model.speaks:
            return Speed(prefill, 1 / decode, None, first, None, None)
        step = self.run(decoders()[1].name, 1, self.context)
        found = []
        for name, evaluations in self.model.solvers.items():
            speech, audio = self._speech(decode, step, evaluations), first + self._first_window(evaluations)
            found.append(Speed(prefill, 1 / decode, 1 / step, first, audio, speech, solver=name))
        return next((speed for speed in found if speed.real_time), found[-1])

    def _speech(self, decode: float, step: float, evaluations: int) -> float:
        """Work for one second of speech: thinker, talker, and windows of DiT and vocoder."""
        windows = self._window(NEW_CODES, evaluations)
        if self.machine.target is None and windows > 1:
            windows = self._window(NEW_CODES_BEHIND, evaluations)
        return TEXT_PER_SECOND * decode + CODES_PER_SECOND * step + windows

    def _window(self, new: int, evaluations: int) -> float:
        """Seconds of DiT and vocoder for a second of speech, in windows of that many new codes."""
        vocoder = self.run(giving("wav").name, FRAMES_PER_CODE * new + 2 * VOCODER_CONTEXT)
        solving = self._solving(window_codes(new, self.model.dit), evaluations)
        return (solving + vocoder) * CODES_PER_SECOND / new

    def _solving(self, codes: int, evaluations: int) -> float:
        """Seconds of the whole solution of a window."""
        return evaluations * self.run(giving("velocity").name, FRAMES_PER_CODE * codes)

    def _first_window(self, evaluations: int) -> float:
        """From the first text token to the first sound; the talker's step i waits for the thinker's token i."""
        thinker, talker = (part.name for part in decoders()[:2])
        both = self.run(thinker, 1, PROMPT) + self.run(talker, 1, PROMPT)
        tail = self._solving(FIRST_CODES, evaluations) + self.run(giving("wav").name, FRAMES_PER_CODE * FIRST_CODES)
        return self.run(talker, PROMPT, PROMPT) + FIRST_CODES * both + tail

    def run(self, graph: str, rows: int, context: int = 0) -> float:
        """Seconds of one call: everything is read once, and multiplied by every row."""
        shape, machine = self.model.graphs[graph], self.machine
        item = self.itemsize(graph)
        reading = shape.other * item / machine.bandwidth
        reading += sum(self._reading(graph, matrix) for matrix in shape.matrices)
        computing = sum(self._operations(m, rows) / self._rate(graph, m) for m in shape.matrices)
        decoder = self.model.decoders.get(graph)
        if decoder is not None:
            reading += decoder.cache_elements(context) * item / machine.bandwidth
            computing += _scores(decoder, rows, context) / machine.rates[self.precision(graph)]
        if rows == 1:  # one row is read, not computed
            computing = 0.0
        return reading + computing + self._layers(shape) * machine.layer

    def _reading(self, graph: str, matrix: Matrix) -> float:
        """Seconds to read weights once, or to unpack them where that takes longer."""
        seconds = self.held_matrix(graph, matrix) / self.machine.bandwidth
        bits = self.scheme(graph, matrix).bits
        if bits in self.machine.unpacking:
            return max(seconds, matrix.elements / self.machine.unpacking[bits])
        return seconds

    def _operations(self, matrix: Matrix, rows: int) -> float:
        return 2 * matrix.elements * (matrix.steps * rows or 1)

    def _rate(self, graph: str, matrix: Matrix) -> float:
        scheme = self.scheme(graph, matrix)
        if scheme.activations:
            return self.machine.rates[scheme.format]
        if matrix.convolves:
            return self.machine.rates["convolution"]
        return self.machine.rates[str(scheme.bits) if scheme.bits else self.precision(graph)]

    def _layers(self, shape: GraphShape) -> float:
        decoder = self.model.decoders.get(shape.name)
        return decoder.layers if decoder is not None else sum(m.count for m in shape.matrices) / _MATRICES


#: matrices of a layer, for graphs that are not decoders
_MATRICES = 6


def _scores(decoder: DecoderShape, rows: int, context: int) -> float:
    """Operations of attention over so many tokens, half of which the last row alone sees."""
    return 4 * decoder.layers * decoder.heads * decoder.head_dim * rows * context / 2
