"""The thinker: transformers' own class at a small size, text model, audio encoder and vision encoder trained together.

    python -m wren.thinker [--work DIR]
    torchrun --nproc-per-node 2 -m wren.thinker [--work DIR]

Every step takes conversations of four kinds (typed, spoken, pictures, clips) of many turns, and learns the answers
alone. The audio encoder also learns to spell what it hears in the text model's own tokens, the vision encoder to name
what it sees. Every 250 steps questions that training never sees are answered, by kind. A second course has more of what
is hard: pictures and spoken questions; a short third one doubts what is in pictures. In two more the audio encoder
alone learns what silence around a question means: nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omniport.runtime.media.log_mel import audio_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

from wren import frame, sizes, world
from wren.conversations import Conversations
from wren.prompts import NO_NAME, Laid
from wren.training import ALONE, Crew, Plan, bf16, drawn_from, train
from wren.world import Draw


@dataclass(frozen=True)
class Course:
    """What is learned in one go.

    Attributes:
        rows: conversations of a step, by kind. shares: of the loss; two clips are noisy.
        seed: of what is drawn.
        doubts: the share of the questions on a picture that was shown before which ask if something is there.
        pauses: the share of the spoken questions with more silence around; then only the audio encoder learns.
    """

    plan: Plan
    rows: Mapping[str, int]
    shares: Mapping[str, float]
    seed: int
    doubts: float = 0.0
    pauses: float = 0.0


FIRST = Course(
    Plan(5000, 1.5e-3, decay=0.02),
    {"typed": 4, "spoken": 6, "picture": 9, "clip": 2},
    {"typed": 1.0, "spoken": 1.0, "picture": 1.5, "clip": 0.7},
    seed=1,
)
# Behind it no typed question was answered wrong, but every ninth on a picture and every tenth that was spoken.
SECOND = Course(
    Plan(2500, 8e-4, decay=0.02, average=0.995),
    {"typed": 2, "spoken": 7, "picture": 14, "clip": 2},
    {"typed": 0.7, "spoken": 1.2, "picture": 2.0, "clip": 0.7},
    seed=6,
)
# Behind it most of what was wrong on pictures was a "Yes" to a colour or a shape that belongs to something else there.
THIRD = Course(
    Plan(900, 4e-4, decay=0.02, average=0.99),
    {"typed": 1, "spoken": 4, "picture": 14, "clip": 1},
    SECOND.shares,
    seed=9,
    doubts=0.4,
)
# Behind it 6 more of 16 questions were answered wrong with 0.3 s of digital silence on both sides. The talker speaks
# from the text model's states, so that one stays what it is.
FOURTH = Course(
    Plan(3600, 1e-3, decay=0.02, average=0.995),
    {"spoken": 7, "picture": 2},
    {"spoken": 1.0, "picture": 0.5},
    seed=12,
    pauses=0.8,
)
# Behind it those with silence around were understood, but of those without 3 of 100 fewer than before.
FIFTH = replace(FOURTH, seed=13, pauses=0.4)
SPELLING = 0.3  # share of what is heard beside the answers
NAMING = 0.5  # share of what is seen
TEST_EVERY, TESTED = 250, 60


@drawn_from(0)
def build(work: Path) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The untrained thinker, its weights drawn as wide as their inputs ask for.

    transformers draws all with a deviation of 0.02, which at this width leaves every layer's output near nothing.
    """
    model = Qwen2_5OmniThinkerForConditionalGeneration(AutoConfig.from_pretrained(frame.folder(work)).thinker_config)
    last = ("o_proj", "down_proj", "out_proj", "fc2", "attn.proj")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv3d)):
                module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()))
                if name.endswith(last):  # what is added to the stream, once or twice a layer
                    module.weight.mul_(1 / math.sqrt(2 * sizes.THINKER["num_hidden_layers"]))
                if module.bias is not None:
                    module.bias.zero_()
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.7)
        model.lm_head.weight.mul_(0.3)
    return model


class Spelling:
    """What is heard, spelled: connectionist temporal classification over the text model's own token embeddings.

    So the sound of a word comes to be what the word itself is to the text model, which then need not learn every
    question twice. Nothing of it is in the trained model but its effect.
    """

    def __init__(self, model: Any, blank: int) -> None:
        self.table, self.blank = model.get_input_embeddings(), blank
        self.outputs = torch.empty(0)
        model.model.audio_tower.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.outputs = output.last_hidden_state

    def loss(self, rows: list[Laid]) -> Tensor:
        """Of the sounds of the batch that the model has just seen."""
        said = [torch.tensor(ids) for row in rows for ids in row.said]
        lengths = torch.tensor([audio_tokens(mel.shape[1]) for row in rows for mel in row.mels])
        scores = self.outputs.float() @ self.table.weight.T / math.sqrt(self.outputs.shape[1])
        spelled = nn.utils.rnn.pad_sequence(list(scores.log_softmax(-1).split(lengths.tolist())))
        counts = torch.tensor([len(ids) for ids in said])
        return functional.ctc_loss(spelled, torch.cat(said), lengths, counts, self.blank, zero_infinity=True)


class Naming:
    """What is seen, named: each token of a picture says the colour and the shape that it shows, and where it moves to,
    by the text model's own token embeddings. Answers alone teach an encoder of this size colours and counts, but
    neither shapes nor directions.
    """

    def __init__(self, model: Any) -> None:
        self.table = model.get_input_embeddings()
        self.outputs = torch.empty(0)
        model.model.visual.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.outputs = output.pooler_output

    def loss(self, rows: list[Laid], nothing: int) -> Tensor:
        """Of the pictures and clips of the batch that the model has just seen."""
        names = torch.from_numpy(np.concatenate([ids for row in rows for ids in row.seen]))
        scores = self.outputs.float() @ self.table.weight.detach().T / math.sqrt(self.outputs.shape[1])
        return naming_loss(scores, names, nothing)


def naming_loss(scores: Tensor, names: Tensor, nothing: int) -> Tensor:
    """Cross entropy of scores [tokens, vocabulary] and names [tokens, 3]: ground and shapes count alike."""
    told = names != NO_NAME
    each = -(scores.log_softmax(-1).gather(1, names.clamp(min=0)) * told).sum(1) / told.sum(1)
    ground = names[:, 0] == nothing
    return (each[ground].mean() + each[~ground].mean()) / 2


class Lessons:
    """The loss of a step: answers of conversations of all kinds, what is heard spelled, what is seen named.

    Args:
        rows: conversations of a step, by kind.
        shares: of the loss, by kind.
        crew: the mean of their losses is that of the step.
    """

    def __init__(
        self,
        model: Any,
        conversations: Conversations,
        rows: Mapping[str, int],
        shares: Mapping[str, float],
        crew: Crew = ALONE,
    ) -> None:
        self.model, self.conversations = model, conversations
        self.rows = {what: count for what, count in crew.share(rows).items() if count}
        whole = sum(shares.values())
        self.shares = {
            what: shares[what] / whole * count * crew.count / rows[what] for what, count in self.rows.items()
        }
        self.tokens = conversations.prompts.manifest.tokens
        self.spelling, self.naming = Spelling(model, self.tokens.audio), Naming(model)

    def loss(self, draw: Draw) -> Tensor:
        each = []
        for what, count in self.rows.items():
            rows = self.conversations.rows(what, draw, count)
            loss = loss_of_rows(self.model, *self.conversations.prompts.batch(rows))
            if any(row.said for row in rows):
                loss = loss + SPELLING * self.spelling.loss(rows)
            if any(row.seen for row in rows):
                loss = loss + NAMING * self.naming.loss(rows, self.tokens.image)
            each.append(self.shares[what] * loss)
        return torch.stack(each).sum()


def loss_of_rows(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of the answers' tokens."""
    with bf16():
        hidden = model.model(**inputs).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted >= 0])
    return functional.cross_entropy(logits.float(), wanted[wanted >= 0])


@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
@torch.no_grad()
def right_answers(model: Any, conversations: Conversations, count: int) -> dict[str, float]:
    """Share of questions whose whole last answer is the likeliest, by kind."""
    shares: dict[str, float] = {}
    for kind in world.KINDS:
        draw, right = np.random.default_rng(7), 0
        for _ in range(count // 12):
            rows = [conversations.prompts.lay(conversations.question(kind, draw)) for _ in range(12)]
            for row in rows:
                row.answers = row.answers[-1:]
            inputs, labels = conversations.prompts.batch(rows)
            with bf16():
                said = model(**inputs).logits[:, :-1].argmax(-1)
            right += int(((said == labels[:, 1:]) | (labels[:, 1:] < 0)).all(1).sum())
        shares[kind] = round(right / (count // 12 * 12), 3)
    return shares


def load(work: Path) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The trained thinker."""
    model = build(work)
    model.load_state_dict(load_file(work / "thinker.safetensors"))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    args = parser.parse_args()
    crew = Crew.join()
    model = build(args.work)
    model.model.visual.load_state_dict(load_file(args.work / "vision.safetensors"))
    trained, held_out = Conversations(args.work, "train"), Conversations(args.work, "held_out")
    model.set_attn_implementation("eager")  # at so few tokens faster than the kernels, and compiled into few loops
    model.model.language_model.compile(dynamic=True)  # minutes at first, then nearly twice as fast

    def taught(course: Course, file: str) -> None:
        weights = args.work / f"{file}.safetensors"
        if weights.exists():
            model.load_state_dict(load_file(weights))
            return
        trained.doubts, trained.pauses = course.doubts, course.pauses
        model.requires_grad_(not course.pauses)
        model.model.audio_tower.requires_grad_(True)
        lessons = Lessons(model, trained, course.rows, course.shares, crew)

        def loss_of(step: int) -> tuple[Tensor, float]:
            if step % TEST_EVERY == 0 and step and crew.number == 0:
                print(f"step {step} held out:", right_answers(model, held_out, TESTED), flush=True)
            loss = lessons.loss(crew.draw(course.seed, step))
            return loss, loss.item()

        found = train(model, loss_of, course.plan, args.work / f"{file}.train.pt", crew=crew)
        model.load_state_dict(found)
        if crew.number == 0:
            save_file({name: value.contiguous() for name, value in found.items()}, weights)
        report("held out:")

    def report(what: str) -> None:
        if crew.number == 0:
            print(what, right_answers(model, held_out, 240), flush=True)

    taught(FIRST, "thinker.first")
    taught(SECOND, "thinker.second")
    taught(THIRD, "thinker.third")
    held_out.pauses = FOURTH.pauses  # the last courses are for these
    report("held out, silence around questions:")
    taught(FOURTH, "thinker.fourth")
    taught(FIFTH, "thinker")
    held_out.pauses = 0.0
    report("held out:")


if __name__ == "__main__":
    main()
