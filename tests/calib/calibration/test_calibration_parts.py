"""Parts of calibration by themselves: observers, ranges, scales, the file, the samples' lockstep, an engine's sites."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omniport.calib.calibration import layer_runner, layer_weights
from omniport.calib.calibration.checkpoint_source import Source
from omniport.calib.calibration.findings import choose_clips
from omniport.calib.calibration.layer_runner import Call, LayerRunner
from omniport.calib.calibration.lockstep import Lockstep, Request
from omniport.calib.calibration.observers import BINS, KEPT_ROWS, Observer
from omniport.calib.calibration.scale_search import Product, awq_factors, smooth_factors
from omniport.calib.calibration.sites import SitePlan
from omniport.calib.calibration.work_dir import Work
from omniport.calib.calibration_file import CLIPS, HEADER_KEY, Calibration, Header, Site, SiteRecord
from omniport.runtime.bundle.recipes import CHANNELS_FIRST, Weight
from omniport.runtime.errors import BundleError, CheckFailed
from safetensors.numpy import load, save

# observers


def seen(pieces: Sequence[torch.Tensor], axis: int = -1) -> Observer:
    observer = Observer("graph/weight", axis, keep=True)
    for piece in pieces:
        observer.see(piece)
    return observer


def spread(seed: int, *shape: int) -> torch.Tensor:
    """Values over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))


def test_maxima_and_counts_do_not_depend_on_the_order() -> None:
    pieces = [spread(i, 3, 40, 8) * 10.0**i for i in (-3, 0, 4, -1)] + [
        torch.zeros(1, 5, 8),
        torch.full((1, 1, 8), 4.0),
    ]
    forward, backward = seen(pieces), seen(pieces[::-1])
    np.testing.assert_array_equal(forward.absmax, backward.absmax)
    np.testing.assert_array_equal(forward.hist, backward.hist)
    whole = torch.cat([piece.reshape(-1, 8) for piece in pieces]).abs()
    np.testing.assert_array_equal(forward.absmax, whole.amax(dim=0).numpy())
    assert forward.count == forward.hist.sum() == whole.numel()


def test_counts_are_those_of_a_histogram_made_at_once() -> None:
    pieces = [torch.randn(50, 64, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(6)]
    found, values = seen(pieces), torch.cat(pieces).abs().numpy().astype(np.float64)
    wanted, _ = np.histogram(values, bins=BINS, range=(0, values.max()))
    # a value may be one bin off: fine bins are put where their middle is
    off = np.abs(np.cumsum(found.hist) - np.cumsum(wanted)).max()
    assert 0 < off < 0.005 * values.size
    assert found.hist[-1] >= 1


def test_channels_of_a_convolution_are_its_second_axis() -> None:
    x = spread(0, 2, 5, 30)
    np.testing.assert_array_equal(seen([x], axis=1).absmax, x.abs().amax(dim=(0, 2)).numpy())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(4, 8)
    x[2, 5] = bad
    with pytest.raises(CheckFailed, match=r"graph/weight: its input is not finite in 1 of 8 channels \(channel 5"):
        seen([x])


def test_rows_are_few_and_evenly_spread() -> None:
    rows = torch.arange(10_000).float()[:, None].repeat(1, 4)
    kept = seen([rows[:7], rows[7:3000], rows[3000:]]).rows[:, 0]
    assert KEPT_ROWS // 2 <= len(kept) <= KEPT_ROWS
    steps = torch.diff(kept)
    assert kept[0] == 0
    assert (steps == steps[0]).all()


# ranges


def histogram(values: NDArray[Any]) -> tuple[NDArray[np.int64], float]:
    top = float(np.abs(values).max())
    return np.histogram(np.abs(values), bins=BINS, range=(0, top))[0].astype(np.int64), top


def int8_error(values: NDArray[Any], clip: float) -> float:
    step = clip / 127
    return float(np.mean((np.clip(np.rint(values / step), -127, 127) * step - values) ** 2))


def test_ranges_cut_off_rare_values_and_keep_uniform_ones() -> None:
    rng = np.random.default_rng(0)
    bell = rng.standard_normal(200_000)
    rare = np.concatenate([bell, [60.0]])
    clips = choose_clips(*histogram(rare))
    assert clips["max"] == 60
    assert 3 < clips["percentile"] < 5
    assert 3 < clips["entropy"] < 15
    assert int8_error(rare, clips["mse"]) < 0.6 * int8_error(rare, clips["max"])
    even = choose_clips(*histogram(rng.uniform(-1, 1, 200_000)))
    assert all(clip > 0.95 for clip in even.values())


def test_the_range_of_least_error_is_that() -> None:
    values = np.random.default_rng(1).laplace(size=100_000)
    hist, top = histogram(values)
    chosen = choose_clips(hist, top)["mse"]
    errors = {clip: int8_error(values, clip) for clip in np.linspace(0.1, 1, 91) * top}
    assert int8_error(values, chosen) < 1.02 * min(errors.values())


def test_nothing_but_zeros_has_a_range() -> None:
    assert choose_clips(np.eye(1, BINS, dtype=np.int64)[0], 0.0) == dict.fromkeys(
        ("max", "percentile", "entropy", "mse"), 0
    )


# scales


def product(outliers: bool, seed: int = 0) -> Product:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, 64, generator=generator)
    if outliers:
        rows[:, ::13] *= 60
    weight = torch.randn(96, 64, generator=generator)
    maxima = (rows.abs().amax(dim=0).numpy(), weight.abs().amax(dim=0).numpy())
    return Product(*maxima, rows, weight)


def w8a8(p: Product, factors: NDArray[np.float32]) -> float:
    """SQNR in dB of a product in INT8: one scale for the input, one for each output of the weight."""
    rows, weight = p.rows / torch.from_numpy(factors), p.weight * torch.from_numpy(factors)
    wanted = p.rows @ p.weight.T
    step, steps = rows.abs().max() / 127, weight.abs().amax(dim=1, keepdim=True) / 127
    found = (torch.round(rows / step) * step) @ (torch.round(weight / steps) * steps).T
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


def int4(p: Product, factors: NDArray[np.float32], block: int) -> float:
    """SQNR in dB of a product whose weights are INT4 in blocks."""
    weight = (p.weight * torch.from_numpy(factors)).unflatten(1, (-1, block))
    steps = weight.abs().amax(dim=2, keepdim=True) / 7
    found = (torch.clamp(torch.round(weight / steps), -8, 7) * steps).flatten(1) / torch.from_numpy(factors)
    wanted, got = p.rows @ p.weight.T, p.rows @ found.T
    return float(10 * torch.log10(wanted.square().sum() / (got - wanted).square().sum()))


def test_smoothing_saves_what_outliers_cost() -> None:
    rough, calm = product(outliers=True), product(outliers=False)
    found = smooth_factors([rough, calm])
    nothing = np.ones(64, np.float32)
    assert w8a8(rough, found[0]) > w8a8(rough, nothing) + 10
    assert w8a8(calm, found[1]) > w8a8(calm, nothing) - 0.5
    for factors in found:
        assert (factors > 0).all()
        assert abs(np.log(factors).mean()) < 1e-5


def test_dead_channels_get_usable_factors() -> None:
    p = product(outliers=True)
    rows, weight = p.rows.clone(), p.weight.clone()
    rows[:, 3] = 0
    weight[:, 7] = 0
    dead = Product(rows.abs().amax(dim=0).numpy(), weight.abs().amax(dim=0).numpy(), rows, weight)
    for factors in (*smooth_factors([dead]), awq_factors(rows, weight, 32)):
        assert np.isfinite(factors).all()
        assert (factors > 0).all()
    assert w8a8(dead, smooth_factors([dead])[0]) > 30


def test_awq_loses_less_than_rounding_to_nearest() -> None:
    p = product(outliers=True)
    nothing = np.ones(64, np.float32)
    assert int4(p, awq_factors(p.rows, p.weight, 32), 32) > int4(p, nothing, 32) + 1


# what convolutions give


def conv_sites(graph: str, sizes: Mapping[str, tuple[int, ...]]) -> list[SitePlan]:
    weights = [Weight(name, "conv", CHANNELS_FIRST, shape) for name, shape in sizes.items()]
    return [SitePlan(graph, (weight,), output) for output in (False, True) for weight in weights]


VOCODER = {"resblocks.0.convs1.0.weight": (64, 64, 3), "resblocks.4.convs2.1.weight": (32, 32, 7)}


@pytest.fixture(scope="module")
def source(tiny_outlier_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.open(tiny_outlier_checkpoint, tmp_path_factory.mktemp("source"))


def vocode(source: Source, folder: Path, mels: Sequence[torch.Tensor], observers: Any = None) -> dict[str, Observer]:
    """What two convolutions of the vocoder read and gave; ``observers``: of a run that was interrupted."""
    engine = LayerRunner(source.definitions["bigvgan"], source.ckpt, conv_sites("bigvgan", VOCODER), folder / "spool")
    if observers is not None:
        Work(folder).keep("bigvgan", 1, observers)
        assert Work(folder).restore("bigvgan", engine.observers) == 1
    for mel in mels:
        (wave,) = engine.run([Call((mel,))])
        assert wave.square().mean() > 1e-4
    return engine.observers


def test_outputs_do_not_depend_on_the_order_and_go_on_after_an_interruption(source: Source, tmp_path: Path) -> None:
    mels = [1.5 * torch.randn(1, 80, 10 + i, generator=torch.Generator().manual_seed(i)) - 5 for i in range(3)]
    whole, turned = vocode(source, tmp_path, mels), vocode(source, tmp_path, mels[::-1])
    resumed = vocode(source, tmp_path, mels[1:], vocode(source, tmp_path, mels[:1]))
    assert len(whole) == 4
    for name, observer in whole.items():
        for other in (turned[name], resumed[name]):
            np.testing.assert_array_equal(observer.absmax, other.absmax)
            np.testing.assert_array_equal(observer.hist, other.hist)
        assert len(np.unique(observer.absmax)) == VOCODER[name.removesuffix(":output")][0]
    assert whole["resblocks.0.convs1.0.weight:output"].count == whole["resblocks.0.convs1.0.weight"].count > 0


@pytest.mark.parametrize(
    ("free", "again", "reads"), [(1 << 30, True, 1), (1 << 20, True, 2), (None, True, 2), (1 << 30, False, 2)]
)
def test_weights_stay_for_calls_to_come_where_there_is_room(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, again: bool, reads: int
) -> None:
    """What is read anew for every call has its freed blocks given back."""
    given_back: list[bool] = []
    monkeypatch.setattr(layer_runner, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(layer_runner.host, "available_memory", lambda: free)
    monkeypatch.setattr(layer_runner.host, "give_back_large_blocks", lambda: given_back.append(True))
    read: list[str] = []
    fill = layer_weights.read_weight
    monkeypatch.setattr(layer_weights, "read_weight", lambda rule, *rest: read.append(str(rule)) or fill(rule, *rest))  # type: ignore[func-returns-value]
    engine = LayerRunner(source.definitions["bigvgan"], source.ckpt, (), tmp_path, again=again)
    mel = torch.zeros(1, 80, 8)
    engine.run([Call((mel,))])
    once = sum("conv_pre" in rule for rule in read)
    engine.run([Call((mel,))])
    assert once > 0
    assert sum("conv_pre" in rule for rule in read) == reads * once
    assert given_back == [True] * (again and reads == 2)


def test_the_audio_encoder_gives_what_comes_before_gelu(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: given.append(x) or gelu(x))  # type: ignore[func-returns-value]
    definition, width = source.definitions["audio_encoder"], source.manifest.audio.n_mels
    sizes = {"conv2.weight": (definition.module().conv2.weight.shape)}  # type: ignore[union-attr]
    engine = LayerRunner(definition, source.ckpt, conv_sites("audio_encoder", sizes), tmp_path, again=False)
    mel = torch.randn(1, width, 200, generator=torch.Generator().manual_seed(0))
    engine.enter([Call((mel, torch.tensor([150])))])
    second = given[1]
    assert second.min() < -0.3, "GELU gives no such value"
    np.testing.assert_array_equal(
        engine.observers["conv2.weight:output"].absmax, second.abs().amax(dim=(0, 2)).detach().numpy()
    )


# the file


def calibration_of_a_convolution() -> Calibration:
    sites = []
    for output in (False, True):
        arrays = {"absmax": np.full(4, 1.0 + output, np.float32), "hist": np.ones(BINS, np.int64)}
        record = SiteRecord(weights=("w",), kind="conv", count=1, clips=dict.fromkeys(CLIPS, 1.0), output=output)
        sites.append(Site(record, arrays))
    records = {"bigvgan": tuple(site.record for site in sites)}
    header = Header(fingerprint="f", data="d", samples=1, seed=0, created_by={}, graphs=records)
    return Calibration(header, {"bigvgan": tuple(sites)})


def test_a_file_keeps_input_and_output_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.calib"
    path.write_bytes(calibration_of_a_convolution().encode())
    found = Calibration.load(path)
    for output in (False, True):
        site = found.site("bigvgan", "w", output)
        assert site is not None
        assert site.arrays["absmax"].tolist() == [1.0 + output] * 4
    assert found.encode() == path.read_bytes()


def test_files_of_other_releases(tmp_path: Path) -> None:
    """Schema 1 had no outputs and is read as it was; what comes later is refused."""
    content = calibration_of_a_convolution().encode()
    arrays = {name: array for name, array in load(content).items() if ":output" not in name}
    header = (
        '{"schema_version":%d,"fingerprint":"f","data":"d","samples":1,"seed":0,"created_by":{},"graphs":{"bigvgan":'
        '[{"weights":["w"],"kind":"conv","count":1,"clips":{"max":1,"percentile":1,"entropy":1,"mse":1}}]}}'
    )
    for version in (1, 3):
        (tmp_path / f"{version}.calib").write_bytes(save(arrays, {HEADER_KEY: header % version}))
    old = Calibration.load(tmp_path / "1.calib")
    assert old.site("bigvgan", "w") is not None
    assert old.site("bigvgan", "w", output=True) is None
    with pytest.raises(BundleError, match="schema version 3, expected 2"):
        Calibration.load(tmp_path / "3.calib")


# lockstep


def jobs_of(lengths: Sequence[int]) -> list[Any]:
    def job(length: int, backend: Any) -> list[float]:
        total: list[float] = []
        for i in range(length):
            time.sleep(0.001 * (length % 3))
            total.append(float(backend.graph("double").run({"x": np.array([i], np.float32)})["y"][0]))
        return total

    return [lambda backend, length=length: job(length, backend) for length in lengths]


def test_jobs_advance_together_and_get_their_own_answers() -> None:
    batches: list[list[int]] = []

    def execute(graph: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
        assert graph == "double"
        batches.append([request.job for request in requests])
        return [{"y": 2 * request.feeds["x"]} for request in requests]

    results = Lockstep[list[float]](execute, lambda *_: None).run(jobs_of([3, 0, 5]))  # type: ignore[arg-type,return-value]
    assert results == [[0, 2, 4], [], [0, 2, 4, 6, 8]]
    assert batches == [[0, 2]] * 3 + [[2]] * 2


def test_an_error_of_a_job_or_of_the_graph_ends_all() -> None:
    def execute(_: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
        if float(requests[0].feeds["x"][0]) == 2:
            raise CheckFailed("the graph broke")
        return [{"y": request.feeds["x"]} for request in requests]

    def broken(backend: Any) -> list[float]:
        backend.graph("double").run({"x": np.zeros(1, np.float32)})
        raise ValueError("the job broke")

    before = threading.active_count()
    with pytest.raises(CheckFailed, match="the graph broke"):
        Lockstep[list[float]](execute, lambda *_: None).run(jobs_of([4, 4]))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="the job broke"):
        Lockstep[list[float]](execute, lambda *_: None).run([*jobs_of([2]), broken])  # type: ignore[arg-type,return-value]
    assert threading.active_count() == before
