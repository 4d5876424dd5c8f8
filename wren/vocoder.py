"""The vocoder: transformers' BigVGAN, mel to sound, trained without a discriminator on spectra at four resolutions.

python -m wren.vocoder [--work DIR] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniBigVGANConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavBigVGANModel

from wren import corpus, sizes, snake
from wren.mel import log_mel
from wren.training import Plan, drawn_from, train

PLAN = Plan(steps=6000, peak=1.5e-3, floor=0.05, betas=(0.8, 0.99), clip=2.0, average=0.995)
BATCH, FRAMES = 4, 32


@drawn_from(0)
def build() -> Qwen2_5OmniToken2WavBigVGANModel:
    """With first weights that keep the signal's size: without them the ends saturate, and nothing is learned."""
    model = Qwen2_5OmniToken2WavBigVGANModel(Qwen2_5OmniBigVGANConfig(**sizes.BIGVGAN))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.ConvTranspose1d):
                taps = module.kernel_size[0] / module.stride[0]
                module.weight.normal_(0, 1 / math.sqrt(module.in_channels * taps))
            elif isinstance(module, nn.Conv1d):
                gain = 0.3 if "convs2" in name else 0.8  # convs2 end a residual branch
                module.weight.normal_(0, gain / math.sqrt(module.weight[0].numel()))
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        model.conv_post.weight.normal_(0, 0.02)
    return model


def load(work: Path) -> Qwen2_5OmniToken2WavBigVGANModel:
    """The trained one."""
    model = build()
    model.load_state_dict(load_file(work / "bigvgan.safetensors"))
    return model.eval()


def vocode(model: Qwen2_5OmniToken2WavBigVGANModel, mel: Tensor) -> Tensor:
    """[batch, n, 80] -> [batch, 240 n]: the class's forward without its clamp, so that what is too loud has a gradient,
    and without its squeeze."""
    x = model.conv_pre(model.process_mel_spectrogram(mel.transpose(1, 2)))
    for number, up in enumerate(model.ups):
        x = cast(nn.ModuleList, up)[0](x)
        first = number * model.num_residual_blocks
        blocks = model.resblocks[first : first + model.num_residual_blocks]
        x = sum(block(x) for block in blocks) / model.num_residual_blocks
    return model.conv_post(model.activation_post(x))[:, 0]


class SpectralLoss:
    """Magnitude and log magnitude at several resolutions, silence above 8 kHz, and the mel that the DiT makes."""

    SIZES = ((2048, 480, 1200), (1024, 240, 600), (512, 100, 300), (256, 50, 160))  # FFT, hop, window
    TOP_HZ = 8200  # flite says nothing above
    QUIET = 3e-3  # magnitudes are alike below
    MEL_SHARE = 0.3

    def __init__(self) -> None:
        self.windows = [torch.hann_window(window) for _, _, window in self.SIZES]

    def __call__(self, made: Tensor, true: Tensor) -> Tensor:
        """[batch, n] each -> the loss"""
        parts = [self.at(made, true, *s, window) for s, window in zip(self.SIZES, self.windows, strict=True)]
        return sum(parts) / len(parts) + self.MEL_SHARE * F.l1_loss(log_mel(made), log_mel(true))

    def at(self, made: Tensor, true: Tensor, fft: int, hop: int, size: int, window: Tensor) -> Tensor:
        """The loss at one resolution."""
        a, b = (torch.stft(s, fft, hop, size, window, return_complex=True) for s in (made, true))
        a, b = ((s.real**2 + s.imag**2 + 1e-6).sqrt() for s in (a, b))
        top = int(self.TOP_HZ / sizes.RATE * fft) + 1
        above, a, b = a[:, top:], a[:, :top], b[:, :top]
        logs = F.l1_loss(a.clamp(min=self.QUIET).log(), b.clamp(min=self.QUIET).log())
        return (a - b).norm() / b.norm() + logs + above.mean()


def batch(crops: corpus.Crops, step: int) -> tuple[Tensor, Tensor]:
    """mel [BATCH, FRAMES, 80] and sound [BATCH, 240 FRAMES], cut from mels of whole replies."""
    picked, _ = crops.draw(step, BATCH)
    mel = torch.stack([r.mel[at : at + FRAMES] for r, at in picked])
    sound = np.stack([r.sound[at * sizes.HOP : (at + FRAMES) * sizes.HOP] for r, at in picked])
    return mel, torch.from_numpy(sound.astype(np.float32) / 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=sizes.WORK)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    snake.install()
    model, loss_of = build(), SpectralLoss()
    crops = corpus.Crops(corpus.both_voices(args.work, "train", sizes.SPEECH_REPLIES), FRAMES, seed=0)

    def loss(step: int) -> tuple[Tensor, float]:
        mel, sound = batch(crops, step)
        value = loss_of(vocode(model, mel), sound)
        return value, value.item()

    weights = train(model, loss, replace(PLAN, steps=args.steps), args.work / "bigvgan.train.pt")
    save_file(weights, args.work / "bigvgan.safetensors")
    (args.work / "bigvgan.json").write_text(json.dumps({"model_type": model.config.model_type, **sizes.BIGVGAN}))


if __name__ == "__main__":
    main()
