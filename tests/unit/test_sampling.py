"""Choosing tokens: exact distributions, reproducible draws, honest margins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from model.decoding.sampling import Sampler, SamplingParams
from model.errors import UsageError

LOGITS = np.array([2.0, 1.0, 0.0, -1.0, -3.0, 0.5, 1.9, -0.5], np.float32)


def expected(temperature: float, kept: list[int]) -> npt.NDArray[np.float64]:
    p = np.zeros(len(LOGITS), np.float64)
    p[kept] = np.exp(LOGITS[kept].astype(float) / temperature)
    p /= p.sum()
    return p


def chi_square(
    params: SamplingParams, target: npt.NDArray[np.float64], draws: int = 20_000
) -> float:
    """Return the statistic over its degrees of freedom.

    Tokens with no probability must not come up at all.
    """
    sampler = Sampler(params)
    counts = np.bincount([sampler.choose(LOGITS, i) for i in range(draws)], minlength=len(LOGITS))
    assert not counts[target == 0].any()
    seen = target > 0
    return float(
        ((counts - draws * target)[seen] ** 2 / (draws * target[seen])).sum()
        / max(seen.sum() - 1, 1)
    )


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=0.8, seed=1), list(range(8))),
        (SamplingParams(temperature=1.5, top_k=3, seed=2), [0, 1, 6]),
        (SamplingParams(temperature=1.0, top_p=0.6, seed=3), [0, 6]),
        (SamplingParams(temperature=1.0, top_k=5, top_p=0.9, seed=4), [0, 1, 5, 6]),
        (SamplingParams(temperature=2.0, min_p=0.4, seed=5), [0, 1, 5, 6]),
        (SamplingParams(temperature=1.0, top_k=3, min_p=0.5, seed=6), [0, 6]),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, kept: list[int]) -> None:
    # χ²/dof > 4.7 has odds of 1 in 10,000 for 4 degrees of freedom, less for 7; the seeds are fixed
    # all the same.
    assert sorted(Sampler(params).kept(LOGITS).tolist()) == kept
    assert chi_square(params, expected(params.temperature, kept)) < 4.7


def test_the_distribution_test_can_fail() -> None:
    assert chi_square(SamplingParams(temperature=0.8, seed=1), expected(1.0, list(range(8)))) > 20


def shaped(params: SamplingParams, prompt: list[int], text: list[int]) -> npt.NDArray[np.float32]:
    sampler = Sampler(params, prompt)
    for token in text:
        sampler.take(token)
    return sampler._shaped(LOGITS) - LOGITS


def test_penalties_count_what_they_say() -> None:
    text = [6, 6, 4]
    prompt = [0, 4]
    presence = shaped(SamplingParams(presence_penalty=0.5), prompt, text)
    assert presence == pytest.approx(np.array([0, 0, 0, 0, -0.5, 0, -0.5, 0]))
    frequency = shaped(SamplingParams(frequency_penalty=0.5), prompt, text)
    assert frequency == pytest.approx(np.array([0, 0, 0, 0, -0.5, 0, -1.0, 0]))
    repeat = shaped(SamplingParams(repeat_penalty=2.0), prompt, text)
    assert repeat == pytest.approx(np.array([-1.0, 0, 0, 0, -3.0, 0, -0.95, 0]))
    bias = shaped(SamplingParams(logit_bias={1: 4.0, 3: -100}), prompt, text)
    assert bias == pytest.approx(np.array([0, 4.0, 0, -100.0, 0, 0, 0, 0]))


class Even:
    """A grammar of even tokens."""

    def allows(self, token: int) -> bool:
        return token % 2 == 0

    def masked(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.where(np.arange(len(logits)) % 2 == 0, logits, -np.inf).astype(np.float32)

    def take(self, token: int) -> None:
        assert self.allows(token)


def test_a_grammar_leaves_the_distribution_of_what_it_allows() -> None:
    sampler = Sampler(SamplingParams(temperature=1.5, seed=3), grammar=Even())
    counts = np.bincount([sampler.choose(LOGITS, i) for i in range(20_000)], minlength=8)
    target = 20_000 * expected(1.5, [0, 2, 4, 6])[::2]
    assert not counts[1::2].any()
    assert float(((counts[::2] - target) ** 2 / target).sum() / 3) < 5.7, (
        "odds of 1 in 2,000; the seed is fixed"
    )
    assert Sampler(SamplingParams(), grammar=Even()).choose(np.roll(LOGITS, 1), 0) == 2


def test_a_draw_hangs_on_seed_and_index_only() -> None:
    a = Sampler(SamplingParams(temperature=1.0, seed=7))
    b = Sampler(SamplingParams(temperature=1.0, seed=7))
    late = a.choose(LOGITS, 700)
    assert [a.choose(LOGITS, i) for i in range(300)] == [b.choose(LOGITS, i) for i in range(300)]
    assert b.choose(LOGITS, 700) == late
    c = Sampler(SamplingParams(temperature=1.0, seed=8))
    assert [a.choose(LOGITS, i) for i in range(50)] != [c.choose(LOGITS, i) for i in range(50)]


def test_top_p_keeps_the_smallest_set_also_beyond_the_first_candidates() -> None:
    flat = np.zeros(1000, np.float32)
    flat[5] = 1e-3
    assert len(Sampler(SamplingParams(temperature=1.0, top_p=0.5)).kept(flat)) == 500
    assert Sampler(SamplingParams(temperature=1.0, top_p=1e-9)).kept(flat).tolist() == [5]


def test_greedy_margin() -> None:
    s = Sampler(SamplingParams())
    assert s.margin(LOGITS, 0, 0) == 0 and s.margin(LOGITS, 1, 0) == pytest.approx(1.0)


@pytest.mark.parametrize("index", range(20))
def test_no_perturbation_within_half_the_margin_changes_a_draw(index: int) -> None:
    s = Sampler(SamplingParams(temperature=0.7, seed=5))
    rng = np.random.default_rng(index)
    chosen = s.choose(LOGITS, index)
    for other in range(len(LOGITS)):
        margin = s.margin(LOGITS, other, index)
        if other == chosen:
            assert margin == 0
            continue
        assert margin > 0
        for _ in range(200):
            noise = rng.choice([-1, 1], len(LOGITS)) * 0.49 * margin
            assert s.choose((LOGITS + noise).astype(np.float32), index) != other


def test_the_margin_is_no_overestimate() -> None:
    """Moving every logit by little more than half the margin, the right way, changes the draw."""
    s = Sampler(SamplingParams(temperature=0.7, seed=5))
    changed = 0
    for index in range(20):
        chosen = s.choose(LOGITS, index)
        for other in {max(chosen - 1, 0), min(chosen + 1, len(LOGITS) - 1)} - {chosen}:
            push = 0.51 * s.margin(LOGITS, other, index)
            side = np.arange(len(LOGITS)) <= min(other, chosen)
            noise = np.where(side, push, -push) * (1 if other < chosen else -1)
            changed += s.choose((LOGITS + noise).astype(np.float32), index) != chosen
    assert changed >= 20


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"min_p": 2.0},
        {"repeat_penalty": 0.0},
        {"presence_penalty": np.nan},
        {"frequency_penalty": 101.0},
        {"logit_bias": {3: np.inf}},
    ],
)
def test_bad_parameters_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 511, 512, 513, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_draws_by_sums_are_those_of_the_whole_cumulated_distribution(
    n: int, temperature: float
) -> None:
    logits = np.random.default_rng(n).normal(0, 4, n).astype(np.float32)
    shares = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    cumulated = shares.cumsum() / shares.sum()
    sampler = Sampler(SamplingParams(temperature=temperature))
    draws = [*np.random.default_rng(0).random(300), 0.0, 1 - 1e-16]
    for draw in draws:
        token = sampler._draw_from(logits, draw)
        expected = min(int(cumulated.searchsorted(draw, side="right")), n - 1)
        near = abs(cumulated[[max(token - 1, 0), token]] - draw).min() < 1e-5  # f32 exponentials
        assert token == expected or near
        assert shares[token] > 0
    # Only the last token is possible, whatever is drawn.
    alone = np.full(n, -1e9, np.float32)
    alone[-1] = 0.0
    assert {sampler._draw_from(alone, draw) for draw in draws} == {n - 1}


def test_a_nucleus_is_the_likeliest_tokens_however_flat_they_are() -> None:
    rng = np.random.default_rng(1)
    for spread, top_p in [(0.01, 0.9), (2.0, 0.95), (8.0, 0.5), (8.0, 0.999)]:
        logits = rng.normal(0, spread, 3000).astype(np.float32)
        shares = np.exp(logits.astype(np.float64))
        order = np.argsort(-shares)
        mass = shares[order].cumsum() / shares.sum()
        expected = order[: int(mass.searchsorted(top_p)) + 1]
        found = Sampler(SamplingParams(temperature=1.0, top_p=top_p)).kept(logits)
        assert abs(len(found) - len(expected)) <= 1
        assert len(set(found) ^ set(expected)) <= 1
