"""What moves: second lessons of the vision encoder and of the whole thinker, on many more clips.

    python -m wren.motion [--work DIR] [--steps N] [--together N]

A thinker that saw one clip a step knew colours, shapes and words of clips, and guessed every direction: 65% of the
questions on clips were answered right. To see a direction it has to compare where a shape is in two frames, which
answers alone do not teach. So the encoder, alone at first, names the direction where it sees the shape, and the whole
thinker goes on from there, with more pictures than before.

WORK/thinker.safetensors becomes WORK/thinker.first.safetensors, and what was learned takes its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wren import sizes, thinker
from wren.training import Plan, train
from wren.vision import Encoder

ALONE = Plan(steps=700, peak=1e-3, decay=0.02, average=0.98)
TOGETHER = Plan(steps=3500, peak=8e-4, decay=0.02, average=0.995)
PICTURES, CLIPS = 12, 5  # of a step of the encoder alone
ROWS = {"typed": 2, "spoken": 5, "picture": 10, "clip": 2}
SHARES = {"typed": 1.0, "spoken": 1.0, "picture": 2.0, "clip": 1.0}
TEST_EVERY, TESTED = 250, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--steps", type=int, default=ALONE.steps)
    parser.add_argument("--together", type=int, default=TOGETHER.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    first, last = args.work / "thinker.first.safetensors", args.work / "thinker.safetensors"
    if not first.exists():
        last.rename(first)
    model = thinker.build(args.work)
    model.load_state_dict(load_file(first))
    trained, held_out = (thinker.Conversations(args.work, split) for split in ("train", "held_out"))
    encoder = Encoder(model, trained.prompts)

    def alone(step: int) -> tuple[Tensor, float]:
        tell = f"step {step}" if step % TEST_EVERY == 0 else ""
        loss = encoder.loss(np.random.default_rng((5, step)), PICTURES, CLIPS, tell)
        return loss, loss.item()

    plan = Plan(args.steps, ALONE.peak, decay=ALONE.decay, average=ALONE.average)
    encoder.encoder.load_state_dict(train(encoder.encoder, alone, plan, args.work / "motion.alone.train.pt"))

    model.model.language_model.compile(dynamic=True)
    lessons = thinker.Lessons(model, trained, ROWS, SHARES)

    def together(step: int) -> tuple[Tensor, float]:
        if step % TEST_EVERY == 0:
            print(f"step {step} held out:", thinker.right_answers(model, held_out, TESTED), flush=True)
        loss = lessons.loss(np.random.default_rng((6, step)))
        return loss, loss.item()

    plan = Plan(args.together, TOGETHER.peak, decay=TOGETHER.decay, average=TOGETHER.average)
    weights = train(model, together, plan, args.work / "motion.together.train.pt")
    save_file({name: value.contiguous() for name, value in weights.items()}, last)
    model.load_state_dict(weights)
    print("held out:", thinker.right_answers(model, held_out, 240), flush=True)


if __name__ == "__main__":
    main()
