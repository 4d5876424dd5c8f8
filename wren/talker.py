"""The talker: transformers' own class at a small size, taught to say the thinker's replies in codes.

    python -m wren.talker [--work DIR]
    torchrun --nproc-per-node 2 -m wren.talker [--work DIR]

It reads what `generate` gives it. Every token of the prompt is the thinker's hidden state plus the token's embedding
(the hidden state alone where a medium stands). Then come the voice's row, with the codec's pad, and the reply: one
token a step together with the code before, then the text's end, then its pad, until the codes end. So the text is told
in the first steps, and has to be found again in them later. Most codes could be guessed from the ones before, which
teaches nothing about the text. So a share of the codes that it is fed is hidden or replaced, and two more things are
learned of every state, by layers that training alone has: codes that come later, and which token of the text it is at.

The thinker is frozen, but for the four rows of its embedding that only the talker reads: voices, text end, text pad.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, Qwen2_5OmniTalkerForConditionalGeneration

from wren import codes, frame, sentences, sizes, thinker
from wren.conversations import Conversations
from wren.prompts import Laid
from wren.training import Crew, Plan, bf16, drawn_from, train
from wren.world import Draw, Question, Split

FIRST = Plan(steps=7000, peak=3e-3, decay=0.01, muon=True)
# Behind it one voice still said every tenth word of typed questions' answers wrong.
SECOND = Plan(steps=4000, peak=1.2e-3, decay=0.01, muon=True)
TOKENS = 3000  # of a step: prompts and codes
# Codes fed: a share of the sentences is fed all; in the others up to so many are hidden, and up to so many replaced.
WHOLE, HIDDEN, REPLACED, RUN = 0.3, 0.9, 0.15, 4
# Codes that are foretold, counted from the next one: most of a syllable, and a word. Shares of the loss.
LATER, FORETELLING, READING = (6, 16), 0.25, 0.1
TEST_EVERY = 500

# The tables in training: codes 1 to CODES, and the rows of control ids. Every other row of the published size is never
# fed, and in the softmax the ids that are never said share one row.
PAD, START, END, MASK, OTHER = (sizes.CODES + i for i in range(1, 6))
PUBLISHED = {PAD: sizes.CODEC_PAD, START: sizes.CODEC_START, END: sizes.CODEC_END, MASK: sizes.CODEC_MASK}
NEVER_SAID = sizes.CODEC_TABLE - sizes.CODES - 1


@dataclass(eq=False)
class Heard:
    """What the thinker gives of one reply, float32: prompt [P, H], reply [R, H], and positions [3, P] of the prompt."""

    prompt: Tensor
    reply: Tensor
    positions: Tensor


class Speaker(nn.Module):
    """The talker, and the rows of the thinker's embedding that are learned with it: each voice, text end, text pad."""

    @drawn_from(0)
    def __init__(self, work: Path) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(frame.folder(work)).talker_config
        config.vocab_size = OTHER + 1
        self.talker: Any = Qwen2_5OmniTalkerForConditionalGeneration(config)
        with torch.no_grad():
            for name, module in self.talker.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0, 1 / math.sqrt(module.in_features))
                    if name.endswith(("o_proj", "down_proj")):
                        module.weight.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
                    if module.bias is not None:
                        module.bias.zero_()
            self.talker.model.embed_tokens.weight.normal_(0, 1)
            self.talker.codec_head.weight.mul_(0.3)
        self.rows = nn.Parameter(torch.randn(len(sizes.REPLY_VOICES) + 2, config.embedding_size) * 0.7)
        said = [*range(sizes.FIRST_CODE, sizes.FIRST_CODE + sizes.CODES), END, OTHER]
        self.register_buffer("said", torch.tensor(said), persistent=False)
        width = config.hidden_size
        self.later = nn.ModuleList(nn.Linear(width, width) for _ in LATER)
        self.reading = nn.Linear(width, sizes.REGULAR_TOKENS + 1)  # the last is no token: the state is between two

    def inputs(self, heard: Heard, voice: str, fed: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [P + 1 + n, H] into the talker's projection and their positions [3, P + 1 + n].

        Args:
            fed: codec ids [n] of the tables in training, START first.
        """
        end, pad = self.rows[-2:-1], self.rows[-1:]
        stream = torch.cat([heard.reply, end, pad.expand(max(0, len(fed) - len(heard.reply) - 1), -1)])[: len(fed)]
        embed = self.talker.model.embed_tokens
        first = self.rows[list(sizes.REPLY_VOICES).index(voice)] + embed.weight[PAD]
        rows = torch.cat([heard.prompt, first[None], stream + embed(fed)])
        # voice and first token continue the text; what follows is behind everything, media that end later too
        tail, highest = int(heard.positions[0, -1]), int(heard.positions.max())
        behind = torch.arange(len(fed) - 1) + max(highest, tail + 2) + 1
        after = torch.cat([torch.tensor([tail + 1, tail + 2]), behind])
        return rows, torch.cat([heard.positions, after.expand(3, -1)], 1)

    def hidden(self, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states [B, S, W] of what ``inputs`` gives, padded behind."""
        width = max(len(r) for r, _ in rows)
        embeds = torch.stack([functional.pad(r, (0, 0, 0, width - len(r))) for r, _ in rows])
        positions = torch.stack([functional.pad(p, (0, width - p.shape[1])) for _, p in rows], 1)
        projected = self.talker.thinker_to_talker_proj(embeds)
        state: Tensor = self.talker.model(inputs_embeds=projected, position_ids=positions).last_hidden_state
        return state

    def logits(self, hidden: Tensor) -> Tensor:
        """Of ``said``, [n, CODES + 2]: the last stands for all ids that are never said."""
        logits = hidden @ self.talker.codec_head.weight[self.said].T
        return torch.cat([logits[:, :-1], logits[:, -1:] + math.log(NEVER_SAID)], 1)

    def forward(
        self,
        heard: Sequence[Heard],
        voices: Sequence[str],
        said: Sequence[Tensor],
        fed: Sequence[Tensor],
        texts: Sequence[Tensor] | None = None,
    ) -> Any:
        """Cross entropy, and the share of codes that are the likeliest.

        Args:
            said: ids [n] to say, END last. fed: ids [n] to feed, START first.
            texts: token ids of each reply; with them the loss has what is foretold and read as well.
        """
        with bf16():
            hidden = self.hidden([self.inputs(*one) for one in zip(heard, voices, fed, strict=True)])
            ends = [len(h.prompt) + 1 for h in heard]
            kept = [row[n : n + len(s)] for row, n, s in zip(hidden, ends, said, strict=True)]
            logits = self.logits(torch.cat(kept)).float()
        target = _classes(torch.cat(list(said)))
        loss = functional.cross_entropy(logits, target)
        if texts is not None:
            loss = loss + FORETELLING * self._foretold(kept, said) + READING * self._read(kept, texts)
        return loss, (logits.argmax(1) == target).float().mean()

    def _foretold(self, kept: Sequence[Tensor], said: Sequence[Tensor]) -> Tensor:
        """Cross entropy of codes that come later."""
        losses = []
        for count, layer in zip(LATER, self.later, strict=True):
            with bf16():
                logits = self.logits(layer(torch.cat([states[:-count] for states in kept]))).float()
            losses.append(functional.cross_entropy(logits, _classes(torch.cat([ids[count:] for ids in said]))))
        return torch.stack(losses).sum()

    def _read(self, kept: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
        """Connectionist temporal classification of the text."""
        with bf16():
            scores = self.reading(nn.utils.rnn.pad_sequence(list(kept)))
        lengths, counts = (torch.tensor([len(one) for one in some]) for some in (kept, texts))
        blank = sizes.REGULAR_TOKENS
        spelled = scores.float().log_softmax(-1)
        return functional.ctc_loss(spelled, torch.cat(list(texts)), lengths, counts, blank, zero_infinity=True)

    def published(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State of the talker with tables of the published size; and the thinker's rows by their names."""
        state = {name: value.detach().clone() for name, value in self.talker.state_dict().items()}
        for name in ("model.embed_tokens.weight", "codec_head.weight"):
            table = state[name][OTHER].expand(sizes.CODEC_TABLE, -1).clone()
            table[: sizes.FIRST_CODE + sizes.CODES] = state[name][: sizes.FIRST_CODE + sizes.CODES]
            if name.startswith("codec_head"):
                table[0] = state[name][OTHER]
                table[sizes.CODEC_END] = state[name][END]
            else:
                for own, id_ in PUBLISHED.items():
                    table[id_] = state[name][own]
            state[name] = table
        return state, dict(zip((*sizes.REPLY_VOICES, "end", "pad"), self.rows.detach(), strict=True))


def _classes(ids: Tensor) -> Tensor:
    """Of ``Speaker.said``, from codec ids."""
    return torch.where(ids == END, sizes.CODES, ids - sizes.FIRST_CODE)


@torch.no_grad()
def listen(model: Any, prompts: Any, rows: Sequence[Laid]) -> list[Heard]:
    """The thinker's part of conversations, the last answer of each being what is to be said."""
    inputs, _ = prompts.batch(rows)
    hidden = model.model(**inputs).last_hidden_state
    ids, tokens = inputs["input_ids"], prompts.manifest.tokens
    media = torch.isin(ids, torch.tensor([tokens.audio, tokens.image, tokens.video]))
    sums = hidden + model.get_input_embeddings()(ids).masked_fill(media[..., None], 0.0)
    heard = []
    for i, row in enumerate(rows):
        span = row.answers[-1]  # its last token ends it, and is not heard
        positions = torch.from_numpy(row.positions[:, : span.start])
        heard.append(Heard(sums[i, : span.start], sums[i, span.start : span.stop - 1], positions))
    return heard


@dataclass(frozen=True)
class Sentence:
    """What is to be said: the reply to a question, in a voice, ids [n]."""

    question: Question
    voice: str
    codes: Tensor


class Sentences:
    """Replies with their codes and the questions that they answer."""

    def __init__(self, work: Path, split: Split) -> None:
        self.conversations = Conversations(work, split)
        self.prompts = self.conversations.prompts
        self.neighbours = codes.neighbours(load_file(work / "codes" / "codebook.safetensors"))
        spoken = {voice: codes.load(work, voice, split) for voice in sizes.REPLY_VOICES}
        questions = list(sentences.spoken_replies(split))
        if split == "train":  # each answer once, and as many again as often as they are given
            questions += sentences.often(len(questions), {question.answer for question in questions})
        found = [
            Sentence(question, voice, torch.tensor(spoken[voice][question.answer]))
            for question in questions
            for voice in sizes.REPLY_VOICES
            if question.answer in spoken[voice]
        ]
        # sentences of one step have prompts of one kind and codes of about one length: little padding
        self.kinds = {
            name: sorted((s for s in found if (s.question.kind == "video") == clip), key=lambda s: len(s.codes))
            for name, clip in (("clip", True), ("other", False))
        }

    def lay(self, sentence: Sentence, draw: Draw) -> Laid:
        spoken = draw.random() < 0.3
        return self.prompts.lay(self.conversations.asked(sentence.question, draw, spoken))

    def draw(self, draw: Draw, tokens: int = TOKENS) -> list[Sentence]:
        """Sentences for one step, of about so many tokens."""
        kind = self.kinds["clip" if draw.random() < 0.15 and self.kinds["clip"] else "other"]
        at = int(draw.integers(len(kind)))
        near = kind[max(0, at - 100) : at + 100]
        prompt = 400 if kind is self.kinds["clip"] else 75
        count = max(2, tokens // (len(near[-1].codes) + prompt))
        return [near[int(i)] for i in draw.integers(len(near), size=count)]

    def fed(self, said: Tensor, draw: Draw) -> Tensor:
        """Codes [n] as they are fed while others are learned: some hidden, in runs, some replaced by similar ones."""
        if draw.random() < WHOLE:
            return said
        replaced = codes.blur(said, draw.uniform(0, REPLACED), self.neighbours, draw)
        share = draw.uniform(0, HIDDEN)
        hidden = np.repeat(draw.random(len(said) // RUN + 1) < share, RUN)[: len(said)]
        return torch.where(torch.from_numpy(hidden), MASK, replaced)


def loss_of(
    speaker: Speaker, model: Any, data: Sentences, some: Sequence[Sentence], draw: Draw, spoil: bool = True
) -> tuple[Tensor, Tensor]:
    """Loss of sentences, and the share of right codes; without ``spoil`` as the talker is used: nothing is hidden."""
    rows = [data.lay(s, draw) for s in some]
    with bf16():
        heard = listen(model, data.prompts, rows)
    heard = [Heard(h.prompt.float(), h.reply.float(), h.positions) for h in heard]
    said = [torch.cat([s.codes, torch.tensor([END])]) for s in some]
    fed = [torch.cat([torch.tensor([START]), data.fed(s.codes, draw) if spoil else s.codes]) for s in some]
    encode = data.prompts.codec.encode
    texts = [torch.tensor(encode(s.question.answer)) for s in some] if spoil else None
    loss, right = speaker(heard, [s.voice for s in some], said, fed, texts)
    return loss, right


def frozen(work: Path) -> Any:
    """The trained thinker as the checkpoint stores it, in BF16."""
    model = thinker.load(work)
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    return model.requires_grad_(False)


def load(work: Path) -> Speaker:
    """The trained one."""
    speaker = Speaker(work)
    speaker.load_state_dict(load_file(work / "talker.safetensors"))
    return speaker.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    args = parser.parse_args()
    crew = Crew.join()
    model = frozen(args.work)
    data, held_out = Sentences(args.work, "train"), Sentences(args.work, "held_out")
    print({name: len(kind) for name, kind in data.kinds.items()}, "sentences", flush=True)

    speaker = Speaker(args.work)
    speaker.talker.set_attn_implementation("eager")  # at so few tokens a step takes three quarters of the time
    speaker.talker.model.compile(dynamic=True)  # minutes at first, then nearly twice as fast

    @torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def test() -> str:
        draw = np.random.default_rng(3)
        each = [loss_of(speaker, model, held_out, held_out.draw(draw), draw, spoil=False) for _ in range(8)]
        loss, right = (float(torch.stack(column).mean()) for column in zip(*each, strict=True))
        return f"loss {loss:.3f}, codes right {right:.3f}"

    def taught(plan: Plan, seed: int, file: str) -> None:
        place = args.work / f"{file}.safetensors"
        if place.exists():
            speaker.load_state_dict(load_file(place))
            return

        def loss(step: int) -> tuple[Tensor, float]:
            if step % TEST_EVERY == 0 and step and crew.number == 0:
                print(f"step {step} held out: {test()}", flush=True)
            draw = crew.draw(seed, step)
            value, _ = loss_of(speaker, model, data, data.draw(draw, TOKENS // crew.count), draw)
            return value, value.item()

        weights = train(speaker, loss, plan, args.work / f"{file}.train.pt", crew=crew)
        speaker.load_state_dict(weights)
        if crew.number == 0:
            save_file({name: value.contiguous() for name, value in weights.items()}, place)
            print(f"held out: {test()}", flush=True)

    taught(FIRST, 3, "talker.first")
    taught(SECOND, 4, "talker")


if __name__ == "__main__":
    main()
