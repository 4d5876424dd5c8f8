"""The thinker: transformers' own class at a small size, text model, audio encoder and vision encoder trained together.

    python -m wren.thinker [--work DIR]

Every step takes conversations of four kinds (typed, spoken, pictures, clips) of many turns, and learns the answers
alone. The audio encoder also learns to spell what it hears in the text model's own tokens, the vision encoder to name
what it sees. Every 250 steps questions that training never sees are answered, by kind. A second course has more of what
is hard: pictures and spoken questions; a short third one doubts what is in pictures. In two more the audio encoder
alone learns what silence around a question means: nothing.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

from wren import frame, media, sentences, sizes, speech_data, world
from wren.prompts import NO_NAME, Floats, Laid, Prompts, Turn
from wren.training import Plan, bf16, drawn_from, train
from wren.world import Draw, Kind, Question, Split


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
# Turns of each kind of conversation: many, so that most of a row is not the system prompt.
TURNS: dict[str, int] = {"typed": 8, "spoken": 3, "picture": 5, "clip": 4}
SPELLING = 0.3  # share of what is heard beside the answers
NAMING = 0.5  # share of what is seen
PAUSE, LONG_PAUSE = 4000, 16000  # samples before and behind a question at most, and where silence is to be learned
FASTER = 0.08  # sounds of training are played faster or slower by so much at most, and with it higher or lower
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


class Conversations:
    """Draws conversations of the world, with pictures and sound.

    Args:
        whole_clips: clips have all their frames, not only those that the model sees.
    """

    def __init__(self, work: Path, split: Split, whole_clips: bool = False) -> None:
        self.split = split
        self.whole_clips = whole_clips
        self.work = work
        self.doubts = 0.0
        self.pauses = 0.0
        self.prompts = Prompts(work)
        self.utterances: dict[str, list[speech_data.Utterance]] = defaultdict(list)
        for voice in sizes.QUESTION_VOICES:
            for utterance in speech_data.spoken(work, voice):
                self.utterances[utterance.text].append(utterance)
        spoken = [q for q in sentences.spoken_questions(split) if q.asked in self.utterances]
        self.spoken = [q for q in spoken if q.picture is None]

    def sound(self, text: str, draw: Draw) -> Floats:
        """A sentence in some voice, speed, level and noise, float32 [n] at 16 kHz."""
        there = self.utterances[text]
        pcm = speech_data.sound_of(self.work, there[int(draw.integers(len(there)))]).astype(np.float32) / 32768
        if self.split == "train":
            at = np.arange(0, len(pcm) - 1, draw.uniform(1 - FASTER, 1 + FASTER))
            pcm = np.interp(at, np.arange(len(pcm)), pcm).astype(np.float32)
        return speech_data.disturb(np.pad(pcm, tuple(draw.integers(0, PAUSE, 2))), draw)

    def question_sound(self, text: str, draw: Draw) -> Floats:
        """``sound``, some of them with more silence around: digital, or with the room's noise."""
        if not self.pauses or draw.random() >= self.pauses:
            return self.sound(text, draw)
        around = tuple(draw.integers(0, LONG_PAUSE, 2))
        said = self.sound(text, draw)
        if draw.random() < 0.5:
            return np.pad(said, around)
        return speech_data.disturb(np.pad(said, around), draw)

    def turn(self, question: Question, draw: Draw, spoken: bool, seen: bool = False) -> Turn:
        """A question as a turn. ``seen``: its picture or clip was shown before."""
        heard = spoken and question.asked in self.utterances
        turn = Turn("" if heard else question.asked, question.answer)
        if heard:
            turn = replace(turn, sound=self.question_sound(question.asked, draw), said=question.asked)
        if question.picture and not seen:
            pixels, places = media.picture(question.picture, draw)
            turn = replace(turn, picture=pixels, places=places, names=question.picture.shapes)
        if question.clip and not seen:
            # where a sampler looks differs with its rule and with the file
            every = np.arange(0, media.CLIP_SECONDS, 1 / media.CLIP_FPS)
            times = every if self.whole_clips else np.linspace(0, draw.uniform(1.5, 2.0), 4)
            sound = media.clip_sound(self.sound(question.clip.word, draw), draw)
            frames, places = media.clip(question.clip, draw, times)
            turn = replace(
                turn, clip=(frames, sound), said=question.clip.word, places=places, names=question.clip.looks
            )
        return turn

    def typed(self, draw: Draw) -> list[Turn]:
        turns: list[Turn] = []
        while len(turns) < TURNS["typed"]:
            kind: Kind = "second_turn" if draw.random() < 0.2 else "typed"
            turns += self.asked(world.draw_question(kind, draw, self.split), draw, spoken=False)
        return turns

    def heard(self, draw: Draw) -> list[Turn]:
        count = TURNS["spoken"]
        if self.pauses and draw.random() < 0.5:
            return [self.turn(self.drawn("spoken", draw), draw, True) for _ in range(count)]
        return [self.turn(self.spoken[int(i)], draw, True) for i in draw.integers(len(self.spoken), size=count)]

    def pictured(self, draw: Draw) -> list[Turn]:
        """A picture and questions on it."""
        spoken = draw.random() < 0.4
        if draw.random() < 0.3:
            question = world.draw_question("second_turn", draw, self.split)
        else:
            question = world.draw_question("picture", draw, self.split)
        turns = self.asked(question, draw, spoken)
        picture = question.picture or (question.first and question.first.picture)
        while len(turns) < TURNS["picture"]:
            if picture:
                if self.doubts and draw.random() < self.doubts:
                    pairs = [world.is_there(picture, draw, nearly=True)]
                else:
                    pairs = world.picture_questions(picture, draw)
                asked, answer = pairs[int(draw.integers(len(pairs)))]
                turns.append(self.turn(Question("picture", asked, answer, picture), draw, spoken, seen=True))
            else:
                turns += self.asked(world.draw_question("typed", draw, self.split), draw, spoken)
        return turns

    def shown(self, draw: Draw) -> list[Turn]:
        """A clip and questions on it."""
        question = world.draw_question("video", draw, self.split)
        assert question.clip is not None
        turns = [self.turn(question, draw, spoken=False)]
        pairs = world.clip_questions(question.clip)
        for _ in range(TURNS["clip"] - 1):
            asked, answer = pairs[int(draw.integers(len(pairs)))]
            turns.append(self.turn(replace(question, asked=asked, answer=answer), draw, False, seen=True))
        return turns

    def asked(self, question: Question, draw: Draw, spoken: bool) -> list[Turn]:
        """One question by itself, behind the turn that it refers to."""
        before = [self.turn(question.first, draw, spoken)] if question.first else []
        return [*before, self.turn(question, draw, spoken)]

    def rows(self, what: str, draw: Draw, count: int) -> list[Laid]:
        make = {"typed": self.typed, "spoken": self.heard, "picture": self.pictured, "clip": self.shown}[what]
        systems = [None if draw.random() < 0.75 else frame.OTHER_PROMPT for _ in range(count)]
        return [self.prompts.lay(make(draw), system) for system in systems]

    def question(self, kind: Kind, draw: Draw) -> list[Turn]:
        """A single question of a kind, behind the turn that it refers to if it does."""
        return self.asked(self.drawn(kind, draw), draw, spoken=kind in ("spoken", "picture_spoken"))

    def drawn(self, kind: Kind, draw: Draw) -> Question:
        """A question of a kind. What is asked aloud is as often of each sort as what is typed.

        Most of the recorded sentences are words to repeat, of which alone there are so many.
        """
        question = world.draw_question(kind, draw, self.split)
        while kind in ("spoken", "picture_spoken") and question.asked not in self.utterances:
            question = world.draw_question(kind, draw, self.split)
        return question


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
    """

    def __init__(
        self, model: Any, conversations: Conversations, rows: Mapping[str, int], shares: Mapping[str, float]
    ) -> None:
        self.model, self.conversations, self.rows, self.shares = model, conversations, rows, shares
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
        return torch.stack(each).sum() / sum(self.shares.values())


def loss_of_rows(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of the answers' tokens."""
    # dense attention is faster than the blockwise kernel at so few tokens
    with bf16(), sdpa_kernel(SDPBackend.MATH):
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
    torch.set_num_threads(1)
    model = build(args.work)
    model.model.visual.load_state_dict(load_file(args.work / "vision.safetensors"))
    trained, held_out = Conversations(args.work, "train"), Conversations(args.work, "held_out")
    model.model.language_model.compile(dynamic=True)  # minutes at first, then nearly twice as fast

    def taught(course: Course, file: str) -> None:
        weights = args.work / f"{file}.safetensors"
        if weights.exists():
            model.load_state_dict(load_file(weights))
            return
        trained.doubts, trained.pauses = course.doubts, course.pauses
        model.requires_grad_(not course.pauses)
        model.model.audio_tower.requires_grad_(True)
        lessons = Lessons(model, trained, course.rows, course.shares)

        def loss_of(step: int) -> tuple[Tensor, float]:
            if step % TEST_EVERY == 0 and step:
                print(f"step {step} held out:", right_answers(model, held_out, TESTED), flush=True)
            loss = lessons.loss(np.random.default_rng((course.seed, step)))
            return loss, loss.item()

        found = train(model, loss_of, course.plan, args.work / f"{file}.train.pt")
        save_file({name: value.contiguous() for name, value in found.items()}, weights)
        model.load_state_dict(found)
        print("held out:", right_answers(model, held_out, 240), flush=True)

    taught(FIRST, "thinker.first")
    taught(SECOND, "thinker.second")
    taught(THIRD, "thinker.third")
    held_out.pauses = FOURTH.pauses  # the last courses are for these
    print("held out, silence around questions:", right_answers(model, held_out, 240), flush=True)
    taught(FOURTH, "thinker.fourth")
    taught(FIFTH, "thinker")
    held_out.pauses = 0.0
    print("held out:", right_answers(model, held_out, 240), flush=True)


if __name__ == "__main__":
    main()
