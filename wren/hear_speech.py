"""How well the speech parts speak: held-out sentences through codes, DiT and vocoder, heard by the ear.

    python -m wren.hear_speech [--work DIR] [--count N] [--bf16] [--samples]

Each stage is heard by itself, and so is what the measure says of flite's own sound (as good as it gets) and of no
speech (chance). A figure counts as long as these two are far apart. Results go to WORK/speech.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from omniport.export.evaluation.hearing import Ear
from safetensors.torch import load_file
from torch import Tensor, nn

from wren import codes, corpus, dit, sizes, snake, vocoder
from wren.grammar import reply_grammar
from wren.mel import mel_of

Sound = NDArray[np.float32]
CHANCE_VOICE = "Chelsie"
SEEN = 300  # training sentences of each voice, for the classifier of voices


class Speech:
    """The trained parts as functions of a reply."""

    def __init__(self, work: Path, bf16: bool) -> None:
        self.codebook = load_file(work / "codes" / "codebook.safetensors")
        self.neighbours = codes.neighbours(self.codebook)
        self.voices = torch.load(work / "spk_dict.pt")
        self.vocoder = vocoder.load(work)
        self.dit = dit.load(work) if (work / "dit.safetensors").exists() else None
        if bf16:
            for part in (self.vocoder, self.dit):
                round_weights(part)

    def stages(self) -> dict[str, Callable[[corpus.Reply], Sound]]:
        """name -> sound of a reply, float32 [n]"""
        found = {
            "flite itself": true_sound,
            "its mel": lambda reply: self.sound(reply.mel),
            "its codes' typical mels": lambda reply: self.sound(
                codes.decode(codes.encode(reply.mel, self.codebook), self.codebook)
            ),
        }
        if self.dit:
            found["its codes through the DiT"] = self.spoken
            found["a tenth of them confused"] = lambda reply: self.spoken(reply, share=0.1)
        return found

    def sound(self, mel: Tensor) -> Sound:
        """[n, 80] -> [240 n], as the class's forward gives it but for its clamp"""
        return vocoder.vocode(self.vocoder, mel[None])[0].numpy()

    def spoken(self, reply: corpus.Reply, share: float = 0) -> Sound:
        """By transformers' own sampler, with its defaults; a share of the codes is replaced by similar ones."""
        assert self.dit is not None
        draw = np.random.default_rng(len(reply.mel))
        said = codes.blur(codes.encode(reply.mel, self.codebook), share, self.neighbours, draw)
        voice = self.voices[reply.voice]
        torch.manual_seed(len(said))
        mel = self.dit.sample(voice["cond"], voice["ref_mel"], said[None])
        return self.sound(mel[0].T)


def true_sound(reply: corpus.Reply) -> Sound:
    return reply.sound.astype(np.float32) / np.float32(32768)


def round_weights(part: nn.Module | None) -> None:
    """Weights as the checkpoint stores them."""
    if part is not None:
        part.load_state_dict({name: value.bfloat16().float() for name, value in part.state_dict().items()})


def chances(replies: list[corpus.Reply]) -> dict[str, list[tuple[str, Sound]]]:
    """Sounds that are not the sentence: noise, its own pieces of 20 ms in another order, another sentence."""
    draw = np.random.default_rng(0)
    noise = [(r.text, draw.normal(0, 0.05, len(r.sound)).astype(np.float32)) for r in replies]
    shuffled = [
        (r.text, draw.permutation(true_sound(r).reshape(-1, sizes.SAMPLES_PER_CODE)).reshape(-1)) for r in replies
    ]
    others = replies[len(replies) // 2 :] + replies[: len(replies) // 2]
    other = [(r.text, true_sound(o)) for r, o in zip(replies, others, strict=True)]
    return {"noise": noise, "shuffled": shuffled, "other sentence": other}


class VoiceClassifier:
    """A plain one: linear discriminant of an utterance's mean mel and its spread, from flite's own sound."""

    def __init__(self, seen: dict[str, list[Tensor]]) -> None:
        points = {voice: torch.stack([self.features(mel) for mel in mels]) for voice, mels in seen.items()}
        self.names = list(points)
        first, second = (points[name] for name in self.names)
        within = torch.cat([first - first.mean(0), second - second.mean(0)])
        spread = within.T @ within / len(within) + 1e-3 * torch.eye(within.shape[1])
        self.direction = torch.linalg.solve(spread, second.mean(0) - first.mean(0))
        self.middle = (first.mean(0) + second.mean(0)) / 2 @ self.direction

    @staticmethod
    def features(mel: Tensor) -> Tensor:
        """[n, 80] -> [160]"""
        return torch.cat([mel.mean(0), mel.std(0)])

    def __call__(self, mel: Tensor) -> str:
        return self.names[int(self.features(mel) @ self.direction > self.middle)]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--count", type=int, default=200, help="held-out sentences of each voice")
    parser.add_argument("--bf16", action="store_true", help="round the weights as the checkpoint stores them")
    parser.add_argument("--samples", action="store_true", help="write the first sentences to WORK/samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    snake.install()
    ear, speech = Ear(reply_grammar()), Speech(args.work, args.bf16)
    seen = {v: [r.mel for r in corpus.replies(args.work, v, "train", SEEN)] for v in sizes.REPLY_VOICES}
    voice_of = VoiceClassifier(seen)
    results: dict[str, dict[str, float]] = {}
    for voice in sizes.REPLY_VOICES:
        replies = list(corpus.replies(args.work, voice, "held_out", args.count))
        for name, speak in speech.stages().items():
            begin = time.process_time()
            sounds = [speak(reply) for reply in replies]
            taken = time.process_time() - begin
            score = ear.score(((r.text, s.clip(-1, 1)) for r, s in zip(replies, sounds, strict=True)))
            results[f"{voice}: {name}"] = {
                "sentences": len(replies),
                "word_error_rate": score.rate,
                "exact": score.exact / score.sentences,
                "right_voice": float(np.mean([voice_of(mel_of(s)) == voice for s in sounds])),
                "peak": float(max(np.abs(s).max() for s in sounds)),
                "seconds_per_second": taken / (sum(map(len, sounds)) / sizes.RATE),
            }
            print_row(f"{voice}: {name}", results)
            if args.samples:
                write_samples(args.work / "samples", voice, name, replies, sounds)
        if voice == CHANCE_VOICE:
            for name, pairs in chances(replies).items():
                score = ear.score(pairs)
                results[f"chance: {name}"] = {"sentences": len(replies), "word_error_rate": score.rate}
                print_row(f"chance: {name}", results)
    (args.work / "speech.json").write_text(json.dumps(results, indent=1) + "\n")


def print_row(name: str, results: dict[str, dict[str, float]]) -> None:
    print(f"{name:40}", ", ".join(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)


def write_samples(
    folder: Path, voice: str, name: str, replies: list[corpus.Reply], sounds: list[Sound], count: int = 6
) -> None:
    folder.mkdir(exist_ok=True)
    for number, (reply, sound) in enumerate(zip(replies[:count], sounds, strict=False)):
        soundfile.write(folder / f"{voice}-{number}-{name.replace(' ', '-')}.wav", sound.clip(-1, 1), sizes.RATE)
        (folder / f"{voice}-{number}.txt").write_text(reply.text + "\n")


if __name__ == "__main__":
    main()
