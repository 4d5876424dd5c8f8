"""The checkpoint: the trained parts in one folder of the Hugging Face layout, in BF16, with a model card.

python -m wren.assemble [--work DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from omniport.export.synthetic.geometries import TTS_FROM_END
from safetensors.torch import load_file, save_file
from torch import Tensor

from wren import frame, sizes, talker, world

OUT = Path("wren/checkpoint")
CARD = Path(__file__).parent / "model_card.md"
#: parts of token2wav -> their names in transformers' model
TOKEN2WAV = {"dit": "code2wav_dit_model", "bigvgan": "code2wav_bigvgan_model"}
#: what the codes are, for a talker that is taught anew (`wren.restore`); in FP16
CODEBOOK = "codebook.safetensors"


def text_to_speech_id(name: str) -> int:
    """Row of the thinker's table that only the talker reads: a voice, ``end`` or ``pad``."""
    return sizes.TEXT_TABLE - TTS_FROM_END[name]


def write(
    out: Path,
    thinker: Mapping[str, Tensor],
    speaker: talker.Speaker,
    token2wav: Mapping[str, Tensor],
    voices: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write the checkpoint.

    Args:
        thinker: its state. token2wav: states of DiT and vocoder under their names in transformers' model.
        voices: ``cond`` [1, 192] and ``ref_mel`` [1, n, 80] of each.
    """
    frame.write_files(out)
    said, rows = speaker.published()
    state = {f"thinker.{name}": value.clone() for name, value in thinker.items()}
    for name, row in rows.items():
        state["thinker.model.language_model.embed_tokens.weight"][text_to_speech_id(name)] = row
    state |= {f"talker.{name}": value for name, value in said.items()}
    state |= {f"token2wav.{name}": value for name, value in token2wav.items()}
    frame.write_weights(out, state)
    table = {name: {"bos_token": text_to_speech_id(name), **voice} for name, voice in voices.items()}
    torch.save(table, out / "spk_dict.pt")


def model_card(work: Path) -> str:
    """The card, with what `wren.evaluate` measured if it did."""
    measured = work / "answers.json"
    if not measured.exists():
        return CARD.read_text().replace("$FIGURES", "Not measured yet.")
    found = json.loads(measured.read_text())
    head = "| questions | asked | right | spoken | words heard wrong | right and heard | speech ended |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for kind in world.KINDS:
        for voice in sizes.REPLY_VOICES:
            if (f := found.get(f"{kind}, {voice}")) is None:  # another run is to ask these
                continue
            shares = [f"{100 * f[name]:.1f}%" for name in ("word_error_rate", "right_and_heard", "ended")]
            name = kind.replace("_", " ")
            lines.append(f"| {name} | {f['questions']} | {100 * f['right']:.1f}% | {voice} | {' | '.join(shares)} |")
    ear, spoken = found["ear"], [f for name, f in found.items() if ", " in name]
    voiced = sum(f["right_voice"] * f["questions"] for f in spoken) / sum(f["questions"] for f in spoken)
    lines += ["", f"The recogniser hears {100 * ear['truth']:.1f}% of the words wrong in flite's own sound, and"]
    lines += [f"{100 * ear['chance']:.1f}% when another sentence is played. A linear classifier of mean spectra tells"]
    lines += [f"{100 * voiced:.1f}% of the voices right, and {sum(f['clipped_samples'] for f in spoken)} samples clip."]
    if compared := [f["transformers"] for f in found.values() if "transformers" in f]:
        count = sum(f["questions"] for f in compared)
        texts, said = (round(sum(f[share] * f["questions"] for f in compared)) for share in ("same_text", "same_codes"))
        lines += [f"transformers' own `generate` gives the same greedy text to {texts} of {count} questions, and the"]
        lines += [f"same codes to {said}."]
    for asked, on in {"spoken": "", "picture_spoken": " on a picture"}.items():
        if f := found.get(asked + world.PAUSES):
            right = f"{100 * f['right']:.1f}% of {f['questions']}"
            lines += ["", f"With up to a second of silence on both sides {right} spoken"]
            lines += [f"questions{on} are answered right."]
    return CARD.read_text().replace("$FIGURES", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    token2wav = {
        f"{name}.{key}": value
        for part, name in TOKEN2WAV.items()
        for key, value in load_file(args.work / f"{part}.safetensors").items()
    }
    voices = torch.load(args.work / "spk_dict.pt")
    write(args.out, load_file(args.work / "thinker.safetensors"), talker.load(args.work), token2wav, voices)
    codebook = load_file(args.work / "codes" / "codebook.safetensors")
    save_file({name: value.half() for name, value in codebook.items()}, args.out / CODEBOOK)
    (args.out / "README.md").write_text(model_card(args.work))
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 1e6
    print(f"{args.out}: {size:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
