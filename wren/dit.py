"""The DiT: transformers' token2wav diffusion transformer, codes and a speaker to mel, trained by flow matching.

    python -m wren.dit [--work DIR]

It learns the straight way from noise to a mel: at a random time between 0 and 1, the difference of the two. In a share
of the examples codes and speaker are hidden, as the sampler's guidance hides them: code 0, zeros for the speaker.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel

from wren import codes, corpus, sentences, sizes
from wren.training import Plan, bf16, drawn_from, train

FIRST = Plan(steps=8000, peak=1.5e-3, decay=0.01)
# Behind it short answers, which are no longer than a piece, were said badly: it had never seen one of them.
SECOND = Plan(steps=2500, peak=5e-4, decay=0.01)
BATCH, FRAMES = 12, 144
HIDDEN = 0.15  # share of examples without conditions
BLUR = 0.2  # share of codes replaced by similar ones, at most: a talker's codes are not flite's
REFERENCE = (80, 200)  # frames of the reference mel, a random number of them
NEAR = 40  # replies before and behind one in the order of their lengths, from which a batch is drawn


def speaker_vectors() -> dict[str, Tensor]:
    """The voices' timbre vectors, [192] each. In the published model a speaker encoder gave them; two voices need no
    more than two fixed points far apart."""
    draw = torch.Generator().manual_seed(7)
    return {voice: torch.randn(sizes.TIMBRE, generator=draw).sign() * 0.5 for voice in sizes.REPLY_VOICES}


@drawn_from(0)
def build(mean: Tensor | None = None) -> Qwen2_5OmniToken2WavDiTModel:
    """With first weights from which it learns.

    Args:
        mean: mean mel [80]. The log mel is far from zero, and the loss stands still for long if the model must first
            find that out: the output begins at the mean, and the input does not see the mean's direction.
    """
    config = Qwen2_5OmniDiTConfig(**sizes.DIT)
    config._attn_implementation = "sdpa"
    model = Qwen2_5OmniToken2WavDiTModel(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()))
                if module.bias is not None:
                    module.bias.zero_()
        for name, weight in model.named_parameters():
            # every block begins as the identity (adaLN-zero)
            if name.endswith(("attn_norm.linear.weight", "norm_out.linear.weight")):
                weight.zero_()
        model.text_embed.codec_embed.weight.normal_(0, 1)
        model.proj_out.weight.mul_(0.1)
        if mean is not None:
            model.proj_out.bias.copy_(mean)
            into = model.input_embed.proj.weight[:, : sizes.MELS]
            into -= torch.outer(into @ mean, mean) / mean.dot(mean)
            into *= 2  # 80 inputs of the mel beside 384 of the conditions
    return model


def load(work: Path) -> Qwen2_5OmniToken2WavDiTModel:
    """The trained one."""
    model = build()
    model.load_state_dict(load_file(work / "dit.safetensors"))
    return model.eval()


class Examples:
    """Replies or pieces of them with their codes, a piece of the same voice as reference, and its speaker vector."""

    def __init__(self, replies: list[corpus.Reply], codebook: dict[str, Tensor]) -> None:
        self.crops = corpus.Crops(replies, FRAMES, seed=0)
        # each once, and as many again as often as they are given
        by_answer = _grouped(replies)
        given = [r for q in sentences.often(len(replies) // 2, by_answer) for r in by_answer[q.answer]]
        self.by_length = sorted([*replies, *given], key=lambda reply: len(reply.mel))
        self.codes = {(r.voice, r.text): codes.encode(r.mel, codebook) for r in replies}
        self.neighbours = codes.neighbours(codebook)
        self.long = {v: [r for r in replies if r.voice == v and len(r.mel) >= REFERENCE[1]] for v in sizes.REPLY_VOICES}
        self.speakers = speaker_vectors()
        self.mean = torch.cat([r.mel for r in replies[::10]]).mean(0)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mel [BATCH, FRAMES, 80], codes [BATCH, FRAMES / 2], reference [BATCH, n, 80], speaker [BATCH, 192]"""
        picked, draw = self.crops.draw(step, BATCH)
        pieces = []
        for reply, first in picked:
            # sentences begin and end more often than chance would show
            where = draw.random()
            last = (len(reply.mel) - FRAMES) // 2 * 2
            pieces.append((reply, 0 if where < 0.2 else last if where < 0.3 else first))
        return self._stacked(pieces, FRAMES, draw)

    def whole(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``batch``, of whole replies of about one length: some codes may be missing at the end."""
        draw = np.random.default_rng((1, step))
        at = int(draw.integers(len(self.by_length)))
        near = self.by_length[max(0, at - NEAR) : at + NEAR]
        count = max(4, BATCH * FRAMES // len(self.by_length[at].mel))
        picked = [near[int(i)] for i in draw.integers(len(near), size=count)]
        frames = min(len(reply.mel) for reply in picked) // 2 * 2
        return self._stacked([(reply, 0) for reply in picked], frames, draw)

    def _stacked(
        self, pieces: list[tuple[corpus.Reply, int]], frames: int, draw: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pieces of replies from their first frames on."""
        size = int(draw.integers(*REFERENCE, endpoint=True))
        rows = []
        for reply, first in pieces:
            long = self.long[reply.voice]
            other = long[int(draw.integers(len(long)))]
            at = int(draw.integers(len(other.mel) - size + 1))
            said = self.codes[reply.voice, reply.text][first // 2 : (first + frames) // 2]
            rows.append(
                (reply.mel[first : first + frames], said, other.mel[at : at + size], self.speakers[reply.voice])
            )
        mels, said, references, speakers = (torch.stack(column) for column in zip(*rows, strict=True))
        return mels, said, references, speakers


def _grouped(replies: list[corpus.Reply]) -> dict[str, list[corpus.Reply]]:
    """The replies of both voices by their text."""
    found: dict[str, list[corpus.Reply]] = {}
    for reply in replies:
        found.setdefault(reply.text, []).append(reply)
    return found


def flow_loss(
    model: Qwen2_5OmniToken2WavDiTModel, batch: tuple[Tensor, Tensor, Tensor, Tensor], draw: torch.Generator
) -> tuple[Tensor, float]:
    """Squared error of the velocity; to show: that of the examples with conditions."""
    mel, said, reference, speaker = batch
    count, frames, _ = mel.shape
    time = torch.rand(count, generator=draw)
    noise = torch.randn(mel.shape, generator=draw)
    at = time[:, None, None]
    told = (torch.rand(count, generator=draw) >= HIDDEN).float()
    # dense attention is faster than the blockwise kernel at so few frames
    with bf16(), sdpa_kernel(SDPBackend.MATH):
        velocity = model(
            hidden_states=(1 - at) * noise + at * mel,
            condition_vector=reference * told[:, None, None],
            speaker_embedding=(speaker * told[:, None])[:, None].expand(-1, frames, -1),
            quantized_code=said * told.long()[:, None],
            time_step=time,
            apply_cfg=False,
        )
    error = (velocity.float() - (mel - noise)).square().mean((1, 2))
    return error.mean(), float((error.detach() * told).sum() / told.sum().clamp(min=1))


def write_voices(work: Path, replies: list[corpus.Reply]) -> None:
    """spk_dict.pt without the tokenizer's ids: speaker vectors, and a piece of a training sentence as reference."""
    table = {}
    for voice, speaker in speaker_vectors().items():
        reply = next(r for r in replies if r.voice == voice and len(r.mel) > sizes.REFERENCE_FRAMES)
        table[voice] = {"cond": speaker[None], "ref_mel": reply.mel[None, : sizes.REFERENCE_FRAMES].clone()}
    torch.save(table, work / "spk_dict.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    args = parser.parse_args()
    torch.set_num_threads(1)
    replies = corpus.both_voices(args.work, "train", sizes.SPEECH_REPLIES)
    write_voices(args.work, replies)
    examples = Examples(replies, load_file(args.work / "codes" / "codebook.safetensors"))
    model = build(examples.mean)

    def pieces(step: int) -> tuple[Tensor, float]:
        return flow_loss(model, examples.batch(step), torch.Generator().manual_seed(step))

    def both(step: int) -> tuple[Tensor, float]:
        drawn = examples.whole(step) if step % 2 else examples.batch(FIRST.steps + step)
        return flow_loss(model, drawn, torch.Generator().manual_seed(FIRST.steps + step))

    for plan, loss, name in ((FIRST, pieces, "dit.first"), (SECOND, both, "dit")):
        file = args.work / f"{name}.safetensors"
        if not file.exists():
            save_file(train(model, loss, plan, args.work / f"{name}.train.pt"), file)
        model.load_state_dict(load_file(file))
    (args.work / "dit.json").write_text(json.dumps({"model_type": model.config.model_type, **sizes.DIT}))


if __name__ == "__main__":
    main()
