"""The vision encoder's first lessons: to name what each token of a picture shows.

    python -m wren.vision [--work DIR] [--steps N]
    torchrun --nproc-per-node 2 -m wren.vision [--work DIR] [--steps N]

So small a transformer needs some hundred thousand pictures to tell shapes apart, whatever their colours. The encoder
alone takes them thirty times as fast as the whole thinker, which then starts from what it has learned here. To see
where a shape moves it has to compare two frames; clips, which are as large as eighteen pictures, come last.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from wren import media, sizes, thinker, world
from wren.prompts import NO_NAME, Laid, Prompts, Turn
from wren.training import Crew, Plan, bf16, train
from wren.world import Draw

PLAN = Plan(steps=2500, peak=2e-3, decay=0.02, average=0.99)
FIRST = 0.6  # share of the steps in which shapes are learned, then directions
PICTURES, CLIPS = (48, 16), (1, 4)  # of a step, first and then
TEST_EVERY = 250


def drawn(prompts: Prompts, draw: Draw, pictures: int, clips: int) -> list[Laid]:
    """Pictures and clips of training, by themselves."""
    turns = []
    for _ in range(pictures):
        scene = world.draw_picture(draw, "train")
        pixels, places = media.picture(scene, draw)
        turns.append(Turn("", "", picture=pixels, places=places, names=scene.shapes))
    for _ in range(clips):
        clip = world.draw_clip(draw, "train")
        frames, places = media.clip(clip, draw, np.linspace(0, draw.uniform(1.5, 2.0), 4))
        silence = np.zeros(sizes.QUESTION_RATE, np.float32)
        turns.append(Turn("", "", clip=(frames, silence), places=places, names=clip.looks))
    return [prompts.lay([turn]) for turn in turns]


class Encoder:
    """The thinker's vision encoder, and what it says by the text model's token embeddings."""

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self.table = model.get_input_embeddings().weight.detach()
        self.encoder, self.prompts = model.model.visual, prompts

    def scores(self, rows: list[Laid]) -> tuple[Tensor, Tensor]:
        """Scores [tokens, vocabulary] of pictures and clips, and their names [tokens, 3]."""
        seen = [look for row in rows for look in (*row.pictures, *row.clips)]
        pixels = np.concatenate([np.reshape(s.patches, (-1, s.patches.shape[-1])) for s in seen])
        with bf16():
            found = self.encoder(torch.from_numpy(pixels), torch.tensor([s.grid_thw for s in seen])).pooler_output
        names = torch.from_numpy(np.concatenate([ids for row in rows for ids in row.seen]))
        return found.float() @ self.table.T / math.sqrt(self.table.shape[1]), names

    def loss(self, draw: Draw, pictures: int, clips: int, tell: str = "") -> Tensor:
        """Of pictures and clips that are drawn; ``tell``: print the share of right names before this."""
        scores, names = self.scores(drawn(self.prompts, draw, pictures, clips))
        if tell:
            shown = names[:, 0] != self.prompts.manifest.tokens.image
            best, wanted = scores[shown].topk(3).indices, names[shown]
            right = [(best == ids[:, None]).any(1)[ids != NO_NAME].float().mean().item() for ids in wanted.T]
            print(f"{tell} colours {right[0]:.3f}, shapes {right[1]:.3f}, directions {right[2]:.3f}", flush=True)
        return thinker.naming_loss(scores, names, self.prompts.manifest.tokens.image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    args = parser.parse_args()
    crew = Crew.join()
    encoder = Encoder(thinker.build(args.work), Prompts(args.work))

    def loss_of(step: int) -> tuple[Tensor, float]:
        tell = f"step {step}" if step % TEST_EVERY == 0 else ""
        then = step >= FIRST * args.steps
        own = crew.share({"pictures": PICTURES[then], "clips": CLIPS[then]})
        loss = encoder.loss(crew.draw(4, step), own["pictures"], own["clips"], tell)
        return loss, loss.item()

    plan = Plan(args.steps, PLAN.peak, decay=PLAN.decay, average=PLAN.average)
    weights = train(encoder.encoder, loss_of, plan, args.work / "vision.train.pt", crew=crew)
    if crew.number == 0:
        save_file({name: value.contiguous() for name, value in weights.items()}, args.work / "vision.safetensors")


if __name__ == "__main__":
    main()
