"""Sampling against transformers' logits processors, on random logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omniport.runtime.bundle.manifest import SamplingConfig
from omniport.runtime.errors import OmniportError, UsageError, UserError
from omniport.runtime.generation.sampling import Sampler, validate_sampling
from support.timing import ratio
from transformers.generation import logits_process as reference

VOCABULARY = 152_064


def random_logits(size: int, seed: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def reference_scores(
    logits: NDArray[np.float32], history: list[int], config: SamplingConfig, suppress: list[int]
) -> torch.Tensor:
    """Processed scores [V] in the order of ``generate``; greedy stops before the warpers."""
    steps: list[Any] = []
    if config.repetition_penalty != 1:
        steps.append(reference.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if suppress:
        steps.append(reference.SuppressTokensLogitsProcessor(suppress))
    if config.temperature > 0:
        steps.append(reference.TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            steps.append(reference.TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            steps.append(reference.TopPLogitsWarper(config.top_p))
    scores = torch.from_numpy(logits.copy())[None]
    for step in steps:
        scores = step(torch.tensor([history], dtype=torch.long), scores)
    return scores[0]


def dense(sampler: Sampler, logits: NDArray[np.float32], history: list[int]) -> NDArray[np.float64]:
    ids, probabilities = sampler.distribution(logits, history)
    assert np.all(np.diff(ids) > 0)
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    full = np.zeros(len(logits))
    full[ids] = probabilities
    return full


SETTINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05),  # the talker's
    SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=2.0),
    SamplingConfig(temperature=1.7, top_k=5),
    SamplingConfig(temperature=0.3, top_p=0.95),
    SamplingConfig(temperature=1.3, top_p=0.5, repetition_penalty=0.7),
    SamplingConfig(temperature=1.0, top_p=1e-6),
    SamplingConfig(temperature=1.0, top_p=0.999999),
    SamplingConfig(temperature=1.0, top_k=10**9, top_p=0.9),
]


@pytest.mark.parametrize(
    "config", SETTINGS, ids=lambda c: f"T{c.temperature}-k{c.top_k}-p{c.top_p}-r{c.repetition_penalty}"
)
@pytest.mark.parametrize(("size", "scale"), [(17, 1.0), (8448, 3.0), (8448, 0.01), (VOCABULARY, 3.0)])
def test_distribution_equals_transformers(config: SamplingConfig, size: int, scale: float) -> None:
    for seed in range(3):
        logits = random_logits(size, seed, scale)
        best = int(np.argmax(logits))
        history = [best, 3, 5, 5, 5, 0, size - 1, best]
        suppress = [2, int(np.argsort(logits)[-2])]
        sampler = Sampler(config, np.random.default_rng(0), suppress)
        expected = torch.softmax(reference_scores(logits, history, config, suppress).double(), dim=-1).numpy()
        actual = dense(sampler, logits, history)
        assert np.count_nonzero(expected) > 0
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
        assert np.array_equal(actual > 0, expected > 0)


def test_penalty_and_suppression_change_the_outcome() -> None:
    """The comparison above is not one of two functions that do nothing."""
    logits = np.asarray([1.0, 4.0, 3.9, -2.0], np.float32)
    greedy = SamplingConfig(temperature=0.0)
    assert Sampler(greedy, None).pick(logits, [1, 1]) == 1
    assert Sampler(greedy, None, suppress=[1]).pick(logits, []) == 2
    penal = SamplingConfig(temperature=0.0, repetition_penalty=1.2)
    assert Sampler(penal, None).pick(logits, [1, 1, 1]) == 2
    np.testing.assert_array_equal(logits, np.asarray([1.0, 4.0, 3.9, -2.0], np.float32))


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3])
def test_greedy_equals_torch_argmax_bit_for_bit(penalty: float) -> None:
    config = SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    for seed in range(20):
        logits = random_logits(4000, seed).round(1)  # rounding makes ties at the top and after the penalty
        history = np.random.default_rng(seed).integers(0, 4000, 900).tolist()
        scores = reference_scores(logits, history, config, [7])
        assert Sampler(config, None, [7]).pick(logits, history) == int(torch.argmax(scores))


def test_greedy_takes_the_lowest_index_of_equals() -> None:
    logits = np.zeros(50, np.float32)
    logits[[9, 21, 40]] = 1.5
    assert Sampler(SamplingConfig(temperature=0.0), None).pick(logits, []) == 9
    assert Sampler(SamplingConfig(temperature=1.0, top_k=1), None).pick(logits, []) == 9


def test_top_k_keeps_everything_that_equals_the_kth() -> None:
    config = SamplingConfig(temperature=1.0, top_k=3)
    logits = np.asarray([5, 4, 1, 4, 4, 0], np.float32)
    expected = torch.softmax(reference_scores(logits, [], config, []), dim=-1).numpy()
    assert np.count_nonzero(expected) == 4
    np.testing.assert_allclose(dense(Sampler(config, None), logits, []), expected, atol=1e-6)


def test_top_p_cut_through_equal_values() -> None:
    config = SamplingConfig(temperature=1.0, top_p=0.55)
    logits = np.zeros(10, np.float32)
    expected = torch.softmax(reference_scores(logits, [], config, []), dim=-1).numpy()
    np.testing.assert_allclose(dense(Sampler(config, None), logits, []), expected, atol=1e-6)
    assert np.count_nonzero(expected) == 6


def test_more_suppressed_than_top_k_leaves() -> None:
    config = SamplingConfig(temperature=1.0, top_k=4)
    ids, _ = Sampler(config, None, suppress=[0, 1, 2]).distribution(np.zeros(5, np.float32), [])
    assert ids.tolist() == [3, 4]


def test_same_seed_same_tokens() -> None:
    config = SamplingConfig(temperature=0.9, top_k=40, top_p=0.8)
    steps = [random_logits(8448, seed) for seed in range(30)]

    def run(seed: int) -> list[int]:
        sampler = Sampler(config, np.random.default_rng(seed))
        return [sampler.pick(logits, []) for logits in steps]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) > 10


def test_picks_follow_the_distribution() -> None:
    sampler = Sampler(SamplingConfig(temperature=0.8, top_k=6, top_p=0.97), np.random.default_rng(0))
    logits = random_logits(64, 5, 1.0)
    ids, probabilities = sampler.distribution(logits, [])
    draws = 4000
    counts = np.bincount([sampler.pick(logits, []) for _ in range(draws)], minlength=64)
    assert counts.sum() == counts[ids].sum() == draws
    sigma = np.sqrt(draws * probabilities * (1 - probabilities))
    assert np.all(np.abs(counts[ids] - draws * probabilities) < 5 * sigma)


def test_cold_temperature_is_greedy_and_stays_finite() -> None:
    logits = random_logits(1000, 0)
    for temperature in (1e-6, 1e-30, 1e-300):
        sampler = Sampler(SamplingConfig(temperature=temperature), np.random.default_rng(0))
        assert sampler.pick(logits, []) == int(np.argmax(logits))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "warm"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
    ],
)
def test_bad_values_name_the_field(field: str, value: object) -> None:
    config = SamplingConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"talker\.{field} is .*{value!r}.* was expected") as caught:
        validate_sampling(config, "talker")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=field):
        Sampler(config, None)


def test_negative_suppressed_id() -> None:
    with pytest.raises(UsageError, match="suppressed"):
        Sampler(SamplingConfig(), None, suppress=[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=3)])
def test_logits_that_are_not_finite(config: SamplingConfig, bad: float) -> None:
    logits = np.zeros(10, np.float32)
    logits[6] = bad
    with pytest.raises(OmniportError, match=r"1 of 10 logits .* not finite .* token 6") as caught:
        Sampler(config, None).pick(logits, [])
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Sampler(SamplingConfig(), None, [0, 1, 2]).pick(np.zeros(3, np.float32), []), "all 3 tokens"),
        (lambda: Sampler(SamplingConfig(), None, [3]).pick(np.zeros(3, np.float32), []), "suppressed tokens hold id 3"),
        (
            lambda: Sampler(SamplingConfig(repetition_penalty=1.1), None).pick(np.zeros(3, np.float32), [0, -1]),
            "tokens so far hold id -1",
        ),
        (lambda: Sampler(SamplingConfig(), None).pick(np.zeros((1, 3), np.float32), []), r"shape \[1, 3\]"),
    ],
)
def test_misuse(act: Callable[[], int], message: str) -> None:
    with pytest.raises(OmniportError, match=message):
        act()


@pytest.mark.parametrize(
    ("config", "sorts"),
    [
        (SamplingConfig(temperature=0.0, repetition_penalty=1.05), 0.05),
        (SamplingConfig(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05), 0.5),
        (SamplingConfig(temperature=0.9, top_p=0.8), 2.0),
    ],
)
def test_speed(config: SamplingConfig, sorts: float) -> None:
    """In units of a stable sort of the vocabulary, on this machine: sorting it fails the first two."""
    sampler = Sampler(config, np.random.default_rng(0))
    logits, history = random_logits(VOCABULARY, 0), np.arange(2000)
    pick, sort = lambda: sampler.pick(logits, history), lambda: np.argsort(logits, kind="stable")
    assert ratio(pick, sort, rounds=10) < sorts


@pytest.mark.parametrize("value", [10**400, 1e308, -(10**400)])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
def test_numbers_that_float32_does_not_hold(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"sampling.{field} is"):
        validate_sampling(SamplingConfig(**{field: value}))


def test_a_penalty_that_float32_rounds_to_nothing() -> None:
    with pytest.raises(UsageError, match="more than 0"):
        validate_sampling(SamplingConfig(repetition_penalty=1e-300))
