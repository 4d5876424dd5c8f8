"""The two halves of time as rows: the same sound as in one row, as torch computes it and as ONNX nodes do."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omniport.export.models.bigvgan import BigVgan, BigVganConfig
from omniport.export.models.module import Constant
from omniport.export.models.ops import merge_rows, split_rows
from support.traced import traced_session
from torch import Tensor, nn
from torch.export import Dim

REACH = 12
KERNEL = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 2, 1, 2 * REACH + 1)).astype(np.float32))
LENGTHS = [2, 3, 11, 12, 13, 24, 25, 26, 101, 300]


class Rows(nn.Module):
    """A convolution that looks `REACH` samples to each side, and what it gives once more in another one."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        return merge_rows(convolved(split_rows(x, self.reach)), x)


def convolved(x: Tensor) -> Tensor:
    return F.conv2d(x, KERNEL, padding=(0, REACH))


def signal(length: int) -> Tensor:
    values: NDArray[np.float32] = np.random.default_rng(length).normal(size=(1, 2, 1, length)).astype(np.float32)
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def graph() -> onnxruntime.InferenceSession:
    return traced_session(Rows(REACH), (signal(40),), ({3: Dim("time")},))


@pytest.mark.parametrize("length", LENGTHS)
def test_two_rows_give_what_one_gives(graph: onnxruntime.InferenceSession, length: int) -> None:
    x = signal(length)
    wanted = convolved(x).numpy()
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(Rows(REACH)(x).numpy(), wanted, atol=2e-5)
    (got,) = graph.run(None, {graph.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_halves_that_overlap_too_little_are_seen() -> None:
    x = signal(101)
    assert np.abs(Rows(REACH - 1)(x).numpy() - convolved(x).numpy()).max() > 1e-2


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_no_longer_than_half_and_the_overlap(length: int) -> None:
    rows = split_rows(signal(length), REACH)
    assert rows.shape == (1, 2, 2, min(length - length // 2 + REACH, length))


def vocoder(rows: bool, reach: int | None = None) -> BigVgan:
    """Of random weights, in which the last layers have rows."""
    torch.manual_seed(0)
    sizes = BigVganConfig(80, 32, (5, 3, 2), (11, 7, 4), (3, 11), ((1, 3, 5), (1, 3, 5)))
    module = BigVgan(sizes).to_empty(device="cpu")
    for name, values in [*module.named_parameters(), *module.named_buffers()]:
        rule = dict(module.named_rules("")).get(name)
        with torch.no_grad():
            if isinstance(rule, Constant):
                values.copy_(torch.from_numpy(rule.value))
            else:
                values.normal_(0, 0.2)
    module.rows = [False, rows, rows]
    module.reach = module.reach if reach is None else reach
    return module.eval()


@pytest.mark.parametrize("frames", [2, 3, 9, 40])
def test_the_vocoder_is_the_same_in_rows(frames: int) -> None:
    mel = torch.from_numpy(np.random.default_rng(frames).normal(-5, 2, (1, 80, frames)).astype(np.float32))
    with torch.inference_mode():
        wanted = vocoder(False)(mel)
        assert wanted.std() > 0.1
        assert (vocoder(True)(mel) - wanted).abs().max() < 1e-5
        if frames == 40:
            assert (vocoder(True, reach=20)(mel) - wanted).abs().max() > 1e-4, "too little overlap is seen"


def test_rows_where_they_pay() -> None:
    """In the published vocoder from 192 channels on; in a small one nowhere: a thread has too little to do there."""
    published = BigVganConfig(80, 1536, (5, 3, 2, 2, 2, 2), (11, 7, 4, 4, 4, 4), (3, 7, 11), ((1, 3, 5),) * 3)
    with torch.device("meta"):
        assert BigVgan(published).rows == [False, False, True, True, True, True]
        assert BigVgan(published).reach == 96
        small = BigVganConfig(80, 128, (5, 4, 4, 3), (11, 8, 8, 7), (3, 7), ((1, 3, 5),) * 2)
        assert not any(BigVgan(small).rows)
