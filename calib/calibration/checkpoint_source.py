"""Open a checkpoint for calibration: modules of its parts, and a bundle without graphs for the runtime's code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omniport.export.bundle_parts import base_manifest, small_parts, write_embeddings
from omniport.export.checkpoint.checkpoint import Checkpoint
from omniport.export.export_options import ExportOptions
from omniport.export.models.model_parts import graph_definitions
from omniport.export.models.part import GraphDefinition
from omniport.export.weights_check import check_weights
from omniport.runtime.bundle.manifest import Manifest
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.prompt.tokenizer import TextCodec
from omniport.runtime.speech.ode import rk4_schedule

_MAX_CONTEXT = 8192


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        definitions: the parts in float32, in the order of the model; a decoder's cache grows with its tokens.
        exported: the same as they are exported by default.
        bundle: without graphs: manifest, embeddings, tokenizer and voices, for the runtime's own code.
    """

    ckpt: Checkpoint
    definitions: Mapping[str, GraphDefinition]
    exported: Mapping[str, GraphDefinition]
    bundle: Bundle
    codec: TextCodec

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @classmethod
    def open(cls, checkpoint: str | os.PathLike[str], folder: Path) -> Source:
        """Open and check a checkpoint; tokenizer, voices and embedding tables are written to ``folder``.

        Raises:
            CheckpointError: it is unusable; missing, extra and wrong-shaped weights are named.
        """
        ckpt = Checkpoint.open(checkpoint)
        context = min(_MAX_CONTEXT, int(ckpt.config.thinker_config.text_config.max_position_embeddings))
        solver = rk4_schedule()
        definitions, exported = (
            graph_definitions(ckpt.config, "fp32", context, solver, ckpt.tied_embeddings, kv_form=form)
            for form in ("concat", "static")
        )
        check_weights(ckpt, definitions.values())
        parts = small_parts(ckpt)
        manifest = base_manifest(ckpt, ExportOptions(max_context=context, kv="concat"), solver, parts.voices)
        folder.mkdir(parents=True, exist_ok=True)
        names = [*parts.write(folder), *write_embeddings(ckpt, folder, lambda _: None)]
        files = {name: folder / name for name in names}
        bundle = Bundle(folder, manifest, files)
        return cls(
            ckpt, definitions, exported, bundle, TextCodec.from_file(files[manifest.tokenizer_file], manifest.tokens)
        )
