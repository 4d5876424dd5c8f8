"""The DiT: transformers' token2wav diffusion transformer, codes and a speaker to mel, trained by flow matching.

    python -m wren.dit [--work DIR] [--steps N]

It learns the straight way from noise to a mel: at a random time between 0 and 1, the difference of the two. In a share
of the examples codes and speaker are hidden, as the sampler's guidance hides them: code 0, zeros for the speaker.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel

from wren import codes, corpus, sizes
from wren.training import Plan, bf16, train

PLAN = Plan(steps=8000, peak=1.5e-3, decay=0.01)
BATCH, FRAMES = 12, 144
HIDDEN = 0.15  # share of examples without conditions
BLUR = 0.2  # share of codes replaced by similar ones, at most: a talker's codes are not flite's
REFERENCE = (80, 200)  # frames of the reference mel, a random number of them


def speaker_vectors() -> dict[str, Tensor]:
    """The voices' timbre vectors, [192] each. In the published model a speaker encoder gave them; two voices need no
    more than two fixed points far apart."""
    draw = torch.Generator().manual_seed(7)
    return {voice: torch.randn(sizes.TIMBRE, generator=draw).sign() * 0.5 for voice in sizes.REPLY_VOICES}


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
    """Pieces of replies with their codes, another piece of the same voice as reference, and its speaker vector."""

    def __init__(self, replies: list[corpus.Reply], codebook: dict[str, Tensor]) -> None:
        self.crops = corpus.Crops(replies, FRAMES, seed=0)
        self.codes = {(r.voice, r.text): codes.encode(r.mel, codebook) for r in replies}
        self.neighbours = codes.neighbours(codebook)
        self.long = {v: [r for r in replies if r.voice == v and len(r.mel) >= REFERENCE[1]] for v in sizes.REPLY_VOICES}
        self.speakers = speaker_vectors()
        self.mean = torch.cat([r.mel for r in replies[::10]]).mean(0)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mel [BATCH, FRAMES, 80], codes [BATCH, FRAMES / 2], reference [BATCH, n, 80], speaker [BATCH, 192]"""
        picked, draw = self.crops.draw(step, BATCH)
        size = int(draw.integers(*REFERENCE, endpoint=True))
        rows = []
        for reply, first in picked:
            # sentences begin and end more often than chance would show
            where = draw.random()
            last = (len(reply.mel) - FRAMES) // 2 * 2
            first = 0 if where < 0.2 else last if where < 0.3 else first
            long = self.long[reply.voice]
            other = long[int(draw.integers(len(long)))]
            at = int(draw.integers(len(other.mel) - size + 1))
            said = self.codes[reply.voice, reply.text][first // 2 : (first + FRAMES) // 2]
            rows.append(
                (reply.mel[first : first + FRAMES], said, other.mel[at : at + size], self.speakers[reply.voice])
            )
        mels, said, references, speakers = (torch.stack(column) for column in zip(*rows, strict=True))
        return mels, said, references, speakers


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
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    replies = corpus.both_voices(args.work, "train", sizes.SPEECH_REPLIES)
    write_voices(args.work, replies)
    examples = Examples(replies, load_file(args.work / "codes" / "codebook.safetensors"))
    model = build(examples.mean)

    def loss(step: int) -> tuple[Tensor, float]:
        return flow_loss(model, examples.batch(step), torch.Generator().manual_seed(step))

    weights = train(model, loss, replace(PLAN, steps=args.steps), args.work / "dit.train.pt")
    save_file(weights, args.work / "dit.safetensors")
    (args.work / "dit.json").write_text(json.dumps({"model_type": model.config.model_type, **sizes.DIT}))


if __name__ == "__main__":
    main()
