"""Options of an export, validated before any work is done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniport.runtime.bundle.manifest import KV_FORMS
from omniport.runtime.bundle.parts import PARTS
from omniport.runtime.errors import ExportError

from .models.part import GraphDefinition
from .option_values import OPS, PRECISIONS, TOKEN2WAV_PRECISIONS, ZERO_POINTS


@dataclass(frozen=True)
class ExportOptions:
    """Options that decide what the graphs of a bundle look like.

    Attributes:
        precision: fp32, fp16 or bf16.
        token2wav: fp32 or fp16, of DiT and vocoder, which are published in FP32.
        max_context: KV-cache capacity in tokens.
        ops: ``native``, or ``decomposed`` for parsers older than the native operators
            (`omniport.export.graphs.lowering`).
        kv: form of the KV cache, ``static`` or ``concat``.
        keep_fp32: regular expressions searched for in ``GRAPH/module.path``: layers that stay float32.
        ranges: a ranges.json; float16 graphs keep in float32 what it shows to overflow.
        zero_points: of a GPTQ or AWQ checkpoint (`omniport.export.option_values.ZERO_POINTS`).
        max_pixels: of a picture, and of a video's frame; None: as the checkpoint says.
        fps: frames a second that are shown of a video. max_frames: how many at most. None: as Qwen's tool.
    """

    precision: str = "fp32"
    token2wav: str = "fp32"
    max_context: int = 8192
    ops: str = "native"
    kv: str = "static"
    keep_fp32: tuple[str, ...] = ()
    ranges: Path | None = None
    zero_points: str = "keep"
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None

    @property
    def patterns(self) -> list[re.Pattern[str]]:
        """``keep_fp32``, compiled."""
        return [re.compile(text) for text in self.keep_fp32]

    def check(self, graphs: Sequence[str] | None) -> None:
        """Raises:
        ExportError: an unknown name, or options that do not go together.
        """
        for what, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("--token2wav", self.token2wav, TOKEN2WAV_PRECISIONS),
            ("--ops", self.ops, OPS),
            ("--kv", self.kv, KV_FORMS),
            ("--zero-points", self.zero_points, ZERO_POINTS),
        ):
            if value not in known:
                raise ExportError(f"no {what} {value!r}; known: {', '.join(known)}")
        unknown = sorted(set(graphs or ()) - PARTS.keys())
        if unknown:
            raise ExportError(f"no graph named {', '.join(unknown)}; known: {', '.join(PARTS)}")
        if self.ops == "decomposed" and self.kv == "static":
            raise ExportError(
                "--ops decomposed goes with --kv concat: a static KV cache is updated in place by TensorScatter, which "
                "has no equivalent before opset 24. Add --kv concat, or leave --ops native."
            )

        self._check_precision()
        self._check_vision()

    def _check_vision(self) -> None:
        for flag, value, least in (
            ("--max-pixels", self.max_pixels, 784),
            ("--fps", self.fps, 0.001),
            ("--max-frames", self.max_frames, 2),
        ):
            if value is not None and not least <= value < 2**31:
                raise ExportError(f"{flag} {value}: expected a finite number of {least} or more")

    def _check_precision(self) -> None:
        for text in self.keep_fp32:
            try:
                re.compile(text)
            except re.error as error:
                raise ExportError(f"--keep-fp32 {text!r} is not a regular expression: {error}") from error
        if self.token2wav != "fp32" and self.precision == "fp32":
            raise ExportError(f"--token2wav {self.token2wav} goes with --precision fp16 or bf16: all is FP32 without")
        if self.keep_fp32 and self.precision == "fp32":
            raise ExportError("--keep-fp32 goes with --precision fp16 or bf16: everything is FP32 already")
        if self.ranges is not None and self.precision != "fp16":
            raise ExportError(
                "--ranges goes with --precision fp16: it is about what overflows float16, and "
                f"{self.precision} has the range of float32"
            )

    def check_patterns(self, definitions: Iterable[GraphDefinition]) -> None:
        """Raises:
        ExportError: a ``keep_fp32`` that matches no module of the half-precision graphs among ``definitions``.
        """
        if not self.keep_fp32:
            return
        half = [definition for definition in definitions if definition.precision != "float32"]
        paths = [f"{d.name}/{path}" for d in half for path, _ in d.module().named_modules() if path]
        if not paths:
            raise ExportError("--keep-fp32: none of the graphs to export is in half precision")
        for pattern in self.patterns:
            if not any(pattern.search(path) for path in paths):
                raise ExportError(
                    f"--keep-fp32 {pattern.pattern!r} matches no layer; it is searched for in names such as "
                    f"{paths[-1]} and {paths[len(paths) // 2]}"
                )

    def check_context(self, limit: int) -> None:
        """Raises:
        ExportError: a capacity that the model has no positions for; ``limit`` is how many it has.
        """
        if not 64 <= self.max_context <= limit:
            raise ExportError(
                f"--max-context {self.max_context}: expected 64 to {limit}, the positions the model was trained on"
            )
