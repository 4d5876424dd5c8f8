"""The training loop: a run that stopped goes on to the same weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from wren.training import Optimizers, Plan, train  # noqa: E402


def trained(state: Path, stop_at: int | None = None, muon: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(OrderedDict(layers=torch.nn.Sequential(torch.nn.Linear(3, 2))))

    def loss(step: int) -> tuple[torch.Tensor, float]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        value = model(x).square().mean()
        return value, value.item()

    return train(model, loss, Plan(steps=20, peak=0.1, rise=2, muon=muon), state, save_every=0)


@pytest.mark.parametrize("muon", [False, True])
def test_a_training_that_stopped_is_the_one_that_did_not(tmp_path: Path, muon: bool) -> None:
    whole = trained(tmp_path / "whole.pt", muon=muon)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts.pt", stop_at=11, muon=muon)
    parts = trained(tmp_path / "parts.pt", muon=muon)
    again = trained(tmp_path / "parts.pt", muon=muon)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name])
        assert torch.equal(tensor, again[name])
    assert whole["layers.0.weight"].abs().max() < 0.5


def test_muon_takes_the_matrices_of_layers_alone() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 2)]), "head": torch.nn.Linear(2, 5)})
    adam, muon = Optimizers(model, Plan(steps=1, peak=1.0, muon=True)).all
    taken = [p for group in muon.param_groups for p in group["params"]]
    assert [id(p) for p in taken] == [id(model["layers"][0].weight)]
    assert sum(len(group["params"]) for group in adam.param_groups) == 3


def test_the_learning_rate_rises_and_falls_to_its_floor() -> None:
    plan = Plan(steps=100, peak=1.0, floor=0.1, rise=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(10) > 0.95
    assert plan.rate(99) == pytest.approx(0.1, abs=0.01)
