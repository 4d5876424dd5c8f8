"""The fused activation against transformers' own."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as hf  # noqa: E402

from wren import snake  # noqa: E402

# taken before anything may have installed the fused one
PLAIN = hf.Qwen2_5OmniAntiAliasedActivation1d.forward
CHANNELS = 5


@pytest.mark.skipif(not shutil.which("g++"), reason="the fused activation needs g++")
@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_the_fused_activation_and_its_gradients_are_the_plain_ones(length: int) -> None:
    torch.manual_seed(length)
    layer = hf.Qwen2_5OmniAntiAliasedActivation1d(hf.Qwen2_5OmniSnakeBeta(CHANNELS))
    with torch.no_grad():
        layer.act.alpha.normal_()
        layer.act.beta.normal_()
    x, weight = torch.randn(2, CHANNELS, length, requires_grad=True), torch.randn(2, CHANNELS, length)
    results = []
    for activation in (PLAIN, snake.fused):
        made = activation(layer, x)
        gradients = torch.autograd.grad((made * weight).sum(), [x, layer.act.alpha, layer.act.beta])
        results.append([made.detach(), *gradients])
    for plain, fused in zip(*results, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
