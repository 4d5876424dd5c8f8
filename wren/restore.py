"""Take trained parts out of a checkpoint into a work folder, to teach anew only what comes after them.

    python -m wren.restore [CHECKPOINT] [--work DIR]

A work folder that has its speech (`wren.speech_data`) then goes on where a part is missing: with thinker, codebook, DiT
and vocoder restored, `wren.codes` and `wren.talker` are left. What is there already, and what the checkpoint does not
have, is left alone. Weights come back as they were stored, in BF16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from omniport.export.synthetic.make_checkpoint import hub_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, Qwen2_5OmniForConditionalGeneration

from wren import frame, sizes
from wren.assemble import CODEBOOK, OUT, TOKEN2WAV


def stored(checkpoint: Path, work: Path) -> dict[str, Tensor]:
    """All weights of the checkpoint in FP32, by transformers' names."""
    config = AutoConfig.from_pretrained(frame.folder(work))
    with torch.device("meta"):
        names = Qwen2_5OmniForConditionalGeneration(config).state_dict()
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("model-*.safetensors")):
        found |= load_file(file)
    return {name: found[hub_key(name)].float() for name in names if hub_key(name) in found}


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=OUT)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    args = parser.parse_args()
    weights = stored(args.checkpoint, args.work)
    parts = {"thinker": part(weights, "thinker.")}
    parts |= {name: part(weights, f"token2wav.{prefix}.") for name, prefix in TOKEN2WAV.items()}
    for name, state in parts.items():
        file = args.work / f"{name}.safetensors"
        if state and not file.exists():
            save_file(state, file)
            print(f"{name}: {len(state)} tensors", flush=True)
    for name, size in (("dit", sizes.DIT), ("bigvgan", sizes.BIGVGAN)):
        (args.work / f"{name}.json").write_text(json.dumps({"model_type": f"qwen2_5_omni_{name}", **size}))
    codebook, voices = args.work / "codes" / "codebook.safetensors", args.work / "spk_dict.pt"
    if not codebook.exists():
        codebook.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.float() for name, value in load_file(args.checkpoint / CODEBOOK).items()}, codebook)
    if not voices.exists():
        table = torch.load(args.checkpoint / "spk_dict.pt")
        own = {name: {key: voice[key] for key in ("cond", "ref_mel")} for name, voice in table.items()}
        torch.save(own, voices)


if __name__ == "__main__":
    main()
