"""The vocoder's activation as ONNX nodes: its own sine, for arguments of any size, and what is done at the ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from omniport.export.models.bigvgan import kaiser_sinc, polyphase
from omniport.export.models.ops import CURVE, CURVE_FACTOR, anti_aliased_snake
from support.traced import traced_session
from torch import Tensor, nn
from torch.export import Dim

CHANNELS = 3


SCALES = torch.tensor([0.5, 1.0, 2.0])[:, None, None]


class Snake(nn.Module):
    """The activation alone."""

    def __init__(self) -> None:
        super().__init__()
        for name, taps in polyphase(CHANNELS).items():
            self.register_buffer(name, taps)

    def forward(self, x: Tensor, rate: Tensor) -> Tensor:
        filters = (self.up_even, self.up_odd, self.down_even, self.down_odd)
        return anti_aliased_snake(x, *filters, rate, CURVE_FACTOR * SCALES)


@pytest.fixture(scope="module")
def graph() -> onnxruntime.InferenceSession:
    return traced_session(Snake(), (torch.zeros(1, CHANNELS, 1, 20), SCALES), ({3: Dim("time")}, None))


def wanted(x: NDArray[np.float32], alpha: float) -> NDArray[np.float64]:
    """By the definition, in float64 and with the phases side by side in time."""
    taps = kaiser_sinc().double().numpy()
    rows = []
    for row, scale in zip(x[0, :, 0].astype(np.float64), (0.5, 1.0, 2.0), strict=True):
        spread = np.zeros(2 * (len(row) + 10))
        spread[::2] = np.pad(row, 5, mode="edge")
        u = 2 * np.convolve(spread, taps)[15 : 15 + 2 * len(row)]
        u = u + scale * np.sin(alpha * scale * u) ** 2
        rows.append(np.convolve(np.pad(u, (5, 6), mode="edge"), taps, mode="valid")[::2])
    return np.stack(rows)[None, :, None]


@pytest.mark.parametrize("alpha", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_the_activation_is_what_it_is_defined_to_be(
    graph: onnxruntime.InferenceSession, alpha: float, length: int
) -> None:
    x = np.random.default_rng(length).normal(0, 2, (1, CHANNELS, 1, length)).astype(np.float32)
    rate = alpha * SCALES / torch.pi
    names = [value.name for value in graph.get_inputs()]
    (got,) = graph.run(None, dict(zip(names, (x, rate.numpy()), strict=True)))
    reference = wanted(x, alpha)
    # an argument of 2 alpha |u| is rounded twice, and its sine moves as much; filters sum up to 1.6
    bound = 2e-6 + 4 * np.finfo(np.float32).eps * 2 * alpha * float(np.abs(x).max()) * 4
    np.testing.assert_allclose(got, reference, atol=bound)
    np.testing.assert_allclose(Snake()(torch.from_numpy(x), rate).numpy(), reference, atol=bound)


def curve(t: NDArray[Any], first: float, second: float, third: float, top: float) -> NDArray[Any]:
    """As `CURVE` says."""
    z = t**2
    q = (((z + first) * z + second) * z + third) * z
    return CURVE_FACTOR * q * (top - q)


def test_the_curve_is_the_square_of_a_sine() -> None:
    half = np.linspace(-0.5, 0.5, 10_001)
    half = half[half != 0]
    wanted = np.sin(np.pi * half) ** 2
    bound = 1e-7  # the fit is off by 6e-8, and coefficients are rounded
    assert np.abs(curve(half, *CURVE) / wanted - 1).max() < bound
    single = half.astype(np.float32)
    assert np.abs(curve(single, *CURVE) - wanted).max() < 3e-7
    for index in range(len(CURVE)):
        planted = list(CURVE)
        planted[index] *= 1 + 1e-4
        assert np.abs(curve(half, *planted) / wanted - 1).max() > bound
