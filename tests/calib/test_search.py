"""Quantizing to a goal: which parts are kept, that the goal is met as measured, and what cannot be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from omniport.calib.report.recorded_calls import Loss, loss_of
from omniport.calib.search import Goal, part_of, parts_of, search
from omniport.runtime.bundle.reader import Bundle
from omniport.runtime.errors import CheckFailed, UsageError
from support.command_line import Omniport

NOISE = {"a": 0.001, "b": 0.3, "c": 0.02, "d": 0.1, "e": 0.0001, "f": 0.05}


class Decoder:
    """Parts whose noise adds up, and more than that where ``pair`` are quantized together."""

    def __init__(self, pair: Sequence[str] = (), extra: float = 0.0) -> None:
        self.pair, self.extra, self.measured = set(pair), extra, list[frozenset[str]]()

    def measure(self, kept: frozenset[str]) -> Loss:
        self.measured.append(kept)
        quantized = NOISE.keys() - kept
        noise = sum(NOISE[part] for part in quantized) + self.extra * (self.pair <= quantized)
        return Loss(-10 * math.log10(noise), kl=noise / 2, agreement=1 - noise)


@pytest.mark.parametrize(
    ("noise", "kept"),
    [(0.5, ""), (0.2, "b"), (0.08, "bd"), (0.03, "bdf"), (0.0012, "bdfc"), (0.00011, "bdfca")],
)
def test_the_fewest_parts_are_kept(noise: float, kept: str) -> None:
    decoder = Decoder()
    for goal in (Goal(sqnr_db=-10 * math.log10(noise)), Goal(kl=noise / 2)):
        found = search(list(NOISE), decoder.measure, goal)
        assert [damage.part for damage in found.damages] == list("bdfcae")
        assert found.kept == tuple(kept)
        assert goal.met(next(p.loss for p in found.curve if p.kept == len(kept)))
        assert not any(goal.met(p.loss) for p in found.curve if p.kept < len(kept))
        assert {0, 1, 3, 4} <= {p.kept for p in found.curve} | {0}
        assert [p.kept for p in found.curve] == sorted({p.kept for p in found.curve})


def test_what_parts_do_together_is_measured_and_not_added_up() -> None:
    """Alone c and a are harmless; a sum of the damages would keep b, d and f only."""
    decoder = Decoder(pair="ca", extra=0.05)
    goal = Goal(sqnr_db=-10 * math.log10(0.03))
    found = search(list(NOISE), decoder.measure, goal)
    assert found.kept == tuple("bdfc")
    assert goal.met(decoder.measure(frozenset(found.kept)))
    assert not goal.met(decoder.measure(frozenset("bdf")))


def test_measurements_are_told_and_none_is_made_twice() -> None:
    decoder, told = Decoder(), list[tuple[str, int, int]]()
    search(list(NOISE), decoder.measure, Goal(sqnr_db=10.0), lambda *step: told.append(step))
    assert len(set(decoder.measured)) == len(decoder.measured) == len(told)
    assert told[0] == ("measuring a alone", 0, 12)
    assert all(done < total for _, done, total in told)


def test_a_goal_that_cannot_be_met() -> None:
    with pytest.raises(UsageError, match=r"e alone quantized.*loss is 40\.0 dB, KL 5e-05; SQNR of at least 60 dB"):
        search(list(NOISE), Decoder().measure, Goal(sqnr_db=60.0))
    with pytest.raises(UsageError, match="one target"):
        Goal()
    with pytest.raises(UsageError, match="one target"):
        Goal(1.0, 1.0)
    with pytest.raises(UsageError, match="more than 0"):
        Goal(kl=0.0)


def test_parts() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"]
    assert parts_of(names) == {"model.layers.0.self_attn": tuple(names[:2]), "lm_head": (names[2],)}
    assert part_of("model.layers.11.mlp.up_proj.weight") == "model.layers.11.mlp"


def test_losses() -> None:
    wanted = [np.array([[3.0, 4.0]], np.float32), np.array([[0.0, 5.0]], np.float32)]
    off = [wanted[0] + np.array([[0.5, 0.0]], np.float32), wanted[1]]
    loss = loss_of("thinker", off, wanted)
    assert loss.sqnr_db == pytest.approx(10 * math.log10(50 / 0.25))
    assert loss.agreement == 1.0
    assert loss.kl == pytest.approx(0.5 * sum(p * math.log(p / q) for p, q in _choices()), rel=1e-6)
    assert loss_of("dit", wanted, wanted) == type(loss)(300.0)
    with pytest.raises(CheckFailed, match="silent"):
        loss_of("dit", off, [np.zeros_like(row) for row in wanted])
    with pytest.raises(CheckFailed, match="not finite"):
        loss_of("dit", [off[0] * np.nan, off[1]], wanted)


def _choices() -> list[tuple[float, float]]:
    """(p, q) of the two tokens of the first step of `test_losses`."""
    p, q = (1 / (1 + math.exp(1)), 1 / (1 + math.exp(0.5)))
    return [(p, q), (1 - p, 1 - q)]


def test_a_bundle_is_quantized_to_a_goal(tiny_bundle: Path, tmp_path: Path, omniport: Omniport) -> None:
    """Half of the talker's last layer, and its head: two parts, so that it takes seconds."""
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "Tell me of the sea."}]}\n')
    out, curve, bundle = tmp_path / "out", tmp_path / "curve.json", tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)  # its thinker gets linked, and onnx does not load what has links
    options = ["--recipe", "int4", "--keep", r"talker/(model\.layers\.[012]|thinker_to|.*self_attn)", "--graph-recipe"]
    options += ["thinker=none", "--target-sqnr", "23", "--data", tmp_path / "talk.jsonl", "--curve", curve]
    code, text, _ = omniport("quantize", bundle, out, *options, "--json")
    assert code == 0
    found = json.loads(text)["search"]
    assert found == json.loads(curve.read_text())
    talker = found["decoders"]["talker"]
    assert [damage["part"] for damage in talker["damages"]] == ["codec_head", "model.layers.3.mlp"]
    assert talker["kept"] == ["codec_head"]
    whole, reached = talker["curve"][0], talker["reached"]
    assert whole["kept"] == 0
    assert whole["sqnr_db"] < 23 <= reached["sqnr_db"] < 40
    assert reached["sqnr_db"] == talker["curve"][1]["sqnr_db"]
    record = Bundle.open(out, verify=True).manifest.quantization
    assert record is not None
    layers = record.layers["talker"]
    assert layers["codec_head.weight"] == "none"
    assert layers["model.layers.3.mlp.up_proj.weight"] == "int4-32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "curve.json", "out", "talk.jsonl"]


def test_bad_goals_leave_nothing(tiny_bundle: Path, tmp_path: Path, omniport: Omniport) -> None:
    out, recipe = tmp_path / "out", ("--recipe", "w8")
    for options, message in [
        (("--target-sqnr", "20", "--max-kl", "1"), "give one target"),
        (("--data", tmp_path / "x"), "go with --target-sqnr or --max-kl"),
        (("--max-kl", "0.1", "--curve", tmp_path / "no" / "x"), "there is no folder"),
        (("--max-kl", "0.1", "--graph-recipe", "thinker=none", "--graph-recipe", "talker=none"), "neither thinker nor"),
        (("--max-kl", "0.1", "--data", tmp_path / "none.jsonl", "--graph-recipe", "talker=none"), "cannot read"),
    ]:
        code, _, said = omniport("quantize", tiny_bundle, out, *recipe, *options)
        assert (code, message in " ".join(said.split())) == (2, True), said
        assert list(tmp_path.iterdir()) == []
