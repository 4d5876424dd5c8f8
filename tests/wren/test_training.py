"""The training loop: a run that stopped goes on to the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import wren  # noqa: E402
from wren.training import Crew, Optimizers, Plan, train  # noqa: E402

#: A step of 4 examples, of which each process takes its share; stopped on the way.
TOGETHER = """
import sys
from pathlib import Path

import torch

from wren.training import Crew, Plan, train

folder = Path(sys.argv[1])
crew = Crew.join()
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
stop_at = 11


def loss(step):
    if step == stop_at:
        raise KeyboardInterrupt
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))[crew.number :: crew.count]
    value = model(x).square().mean()
    return value, value.item()


def taught():
    return train(model, loss, Plan(steps=20, peak=0.1, rise=2), folder / "state.pt", save_every=0, crew=crew)


try:
    taught()
except KeyboardInterrupt:
    stop_at = None
torch.distributed.barrier()  # the first one has written its state
print("process", crew.number, flush=True)
weights = taught()
model.weight.grad, model.bias.grad = torch.full((2, 3), float(crew.number)), None
crew.average(model)
torch.save({**weights, "gradient": model.weight.grad}, folder / f"{crew.number}.pt")
"""


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


@pytest.mark.slow
def test_processes_that_train_together_come_to_the_weights_of_one(tmp_path: Path) -> None:
    """Each gives its share of a step; one that was stopped goes on with the others."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = {"PYTHONPATH": str(Path(wren.__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, script, tmp_path], capture_output=True, text=True, timeout=300, env={**os.environ, **own}
    )
    assert done.returncode == 0, done.stderr
    assert "step 11 of 20" in done.stdout
    assert "process 0" in done.stdout
    assert "process 1" not in done.stdout, "only one of them tells how far it is"

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)

    def loss(step: int) -> tuple[torch.Tensor, float]:
        value = model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().mean()
        return value, value.item()

    alone = train(model, loss, Plan(steps=20, peak=0.1, rise=2), tmp_path / "alone.pt")
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert torch.equal(first["gradient"], torch.full((2, 3), 0.5))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)


def test_every_thing_of_a_step_is_some_process_s() -> None:
    counts = {"typed": 4, "spoken": 7, "picture": 14, "clip": 1, "other": 3}
    for many in (1, 2, 3, 4):
        shares = [Crew(number, many).share(counts) for number in range(many)]
        for name, count in counts.items():
            each = [share[name] for share in shares]
            assert sum(each) == count
            assert max(each) - min(each) <= 1
    left = [Crew(number, 2).share({"a": 1, "b": 1}) for number in range(2)]
    assert left == [{"a": 1, "b": 0}, {"a": 0, "b": 1}], "nobody gets all that is left over"


def test_processes_draw_other_things_and_the_first_what_one_alone_does() -> None:
    alone, first, second = (crew.draw(3, 5).random(4).tolist() for crew in (Crew(), Crew(0, 2), Crew(1, 2)))
    assert alone == first != second
