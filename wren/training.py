"""The loop that trains a part: learning rate, averaged weights, progress with time left, and going on after a stop.

Several processes can train together (`torchrun --nproc-per-node 2 -m wren.talker`): each takes its share of a step, and
their gradients are averaged. `Crew` is what a part needs to know of it.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Plan:
    """Steps of AdamW: a short rise of the learning rate, then half a cosine down to ``floor`` of the peak."""

    steps: int
    peak: float
    floor: float = 0.02
    rise: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    decay: float = 0.0
    clip: float = 1.0
    average: float = 0.998  # of the weights that are kept: mean over about 1 / (1 - average) steps
    muon: bool = False  # for the matrices of decoder layers, at the rate of AdamW: its updates are scaled to those

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.peak * min(1.0, (step + 1) / self.rise) * (self.floor + (1 - self.floor) * cosine)


def bf16() -> AbstractContextManager[None]:
    """Products in BF16 where the processor has them, else FP32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu.get_capabilities().get("avx512_bf16")))


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Weights that are drawn inside depend on the seed alone, not on what was drawn before; nothing outside changes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Crew:
    """The processes that train together, each with one thread: ``count`` of them, this one being the ``number``-th."""

    number: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Crew:
        """Those that `torchrun` started; without it this process is alone. All but the first are silent."""
        torch.set_num_threads(1)
        if not distributed.is_torchelastic_launched():
            return cls()
        distributed.init_process_group("gloo")
        crew = cls(distributed.get_rank(), distributed.get_world_size())
        if crew.number:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- as long as the process
        return crew

    def draw(self, seed: int, step: int) -> np.random.Generator:
        """What this process draws in a step. The first one draws what a process that is alone does."""
        return np.random.default_rng((seed, step, self.number))

    def share(self, counts: Mapping[str, int]) -> dict[str, int]:
        """How many of the things of a step are this process's. What is left over goes to another one each time."""
        return {
            name: len(range((self.number + i) % self.count, count, self.count))
            for i, (name, count) in enumerate(counts.items())
        }

    def average(self, model: nn.Module) -> None:
        """Every gradient becomes the mean of all processes'."""
        if self.count == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= self.count
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Crew()


class Optimizers:
    """AdamW, or Muon for the matrices of decoder layers and AdamW for everything else."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        named = list(model.named_parameters())
        inner = [p for name, p in named if plan.muon and p.ndim == 2 and ".layers." in f".{name}"]
        chosen = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, plan.peak, plan.betas, weight_decay=plan.decay, fused=True)
        ]
        if inner:
            decay = 10 * plan.decay  # its matrices have no other bound
            self.all.append(torch.optim.Muon(inner, plan.peak, decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def train(
    model: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, float]],
    plan: Plan,
    state: Path,
    save_every: float = 180,
    crew: Crew = ALONE,
) -> dict[str, Tensor]:
    """Train, and give the averaged weights; finished trainings only give them.

    Args:
        loss_of: the loss of a step and the figure to show. What it draws must depend on the step alone: then a
            training that stopped and goes on is the one that did not stop.
        state: file that it goes on from, written every ``save_every`` seconds.
        crew: who trains together. The step's loss is the mean of theirs; the first one writes ``state``.
    """
    optimizers = Optimizers(model, plan)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    step, shown = 0, math.nan
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizers"])
        average, step, shown = saved["average"], saved["step"], saved["shown"]

    def save() -> None:
        part = state.with_suffix(".part")
        whole = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "average": average}
        torch.save({**whole, "step": step, "shown": shown}, part)
        part.replace(state)

    count = sum(p.numel() for p in model.parameters())
    print(f"{state.name}: {count / 1e6:.2f} M parameters, step {step} of {plan.steps}", flush=True)
    first, begin = step, time.monotonic()
    saved_at = begin
    while step < plan.steps:
        loss, figure = loss_of(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        crew.average(model)
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizers.step(plan.rate(step))
        step += 1
        with torch.no_grad():
            share = 1 - min(plan.average, (step + 1) / (step + 20))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, share)
        shown = figure if math.isnan(shown) else 0.98 * shown + 0.02 * figure
        now = time.monotonic()
        if step % 100 == 0 or step == plan.steps:
            each = (now - begin) / (step - first)
            left = each * (plan.steps - step) / 60
            print(f"step {step} loss {shown:.4f}, {each * 1000:.0f} ms a step, {left:.1f} min left", flush=True)
        if crew.number == 0 and (now - saved_at > save_every or step == plan.steps):
            save()
            saved_at = now
    return average
