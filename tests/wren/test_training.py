"""The training loop: a run that stopped goes on to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from wren.training import Plan, train  # noqa: E402


def trained(state: Path, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)

    def loss(step: int) -> tuple[torch.Tensor, float]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        value = model(x).square().mean()
        return value, value.item()

    return train(model, loss, Plan(steps=20, peak=0.1, rise=2), state, save_every=0)


def test_a_training_that_stopped_is_the_one_that_did_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts.pt", stop_at=11)
    parts = trained(tmp_path / "parts.pt")
    again = trained(tmp_path / "parts.pt")
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name])
        assert torch.equal(tensor, again[name])
    assert whole["weight"].abs().max() < 0.5


def test_the_learning_rate_rises_and_falls_to_its_floor() -> None:
    plan = Plan(steps=100, peak=1.0, floor=0.1, rise=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(10) > 0.95
    assert plan.rate(99) == pytest.approx(0.1, abs=0.01)
