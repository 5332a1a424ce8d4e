"""A planted liking for long answers is taken out of the win rate, and only that."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from rayrlhf.evaluation.length_control import LengthControlled, at_equal_lengths, length_controlled
from rayrlhf.evaluation.ratings import Interval, strengths, t_quantile

Floats = npt.NDArray[np.float64]


def tournament(
    rng: np.random.Generator, *, num: int, prompts: int, truth: float, liking: float
) -> tuple[Floats, Floats]:
    """Return wins and length gaps (num, prompts) of a model that is mostly the longer one."""
    gaps = rng.normal(30.0, 60.0, size=(num, prompts))
    pulled = liking * np.tanh(gaps / gaps.std(axis=-1, keepdims=True))
    logit = math.log(truth / (1 - truth)) + pulled
    return (rng.random(gaps.shape) < 1 / (1 + np.exp(-logit))).astype(np.float64), gaps


@pytest.mark.parametrize(
    ("prompts", "truth", "liking"), [(200, 0.4, 1.5), (50, 0.4, 1.5), (100, 0.5, 3.0)]
)
def test_the_truth_comes_back_from_a_judge_who_likes_length(
    prompts: int, truth: float, liking: float
) -> None:
    rng = np.random.default_rng(prompts)
    won, gaps = tournament(rng, num=2000, prompts=prompts, truth=truth, liking=liking)
    assert won.mean() > truth + 0.1  # what a plain win rate says
    logits, errors, coefficients = at_equal_lengths(won, gaps)
    assert (1 / (1 + np.exp(-logits))).mean() == pytest.approx(truth, abs=0.01)
    assert coefficients.mean() == pytest.approx(liking, abs=0.1)
    covered = np.abs(logits - math.log(truth / (1 - truth))) <= t_quantile(prompts) * errors
    assert 0.93 <= covered.mean() <= 0.97


def test_a_judge_blind_to_length_is_left_alone() -> None:
    won, gaps = tournament(np.random.default_rng(1), num=1, prompts=4000, truth=0.7, liking=0.0)
    found = length_controlled(won[0], gaps[0])
    assert found.win_rate.value == pytest.approx(won.mean(), abs=0.02)
    assert abs(found.coefficient) < 0.2


@pytest.mark.parametrize(
    ("mean", "spread", "num"),
    [(100, 5, 100), (200, 8, 50), (500, 1, 1000), (100, 10, 100), (300, 40, 64), (500, 0, 10)],
)
def test_one_that_is_longer_in_every_battle_tells_nothing_of_equal_lengths(
    mean: float, spread: float, num: int
) -> None:
    rng = np.random.default_rng(0)
    found = length_controlled(
        (rng.random(num) < 0.6).astype(float), rng.normal(mean, spread, num).round()
    )
    assert found == LengthControlled(Interval(0.5, 0.0, 1.0), 0.0)


@pytest.mark.parametrize("mean", [0.5, 1.0, 1.5, 2.0])
def test_one_that_is_mostly_longer_has_a_wide_interval_around_the_truth(mean: float) -> None:
    """The judge is blind to length, so that the truth is 0.6 at any."""
    rng = np.random.default_rng(1)
    inside, widths = [], []
    for _ in range(60):
        won = (rng.random(200) < 0.6).astype(float)
        found = length_controlled(won, rng.normal(mean, 1.0, 200)).win_rate
        inside.append(found.low <= 0.6 <= found.high)
        widths.append(found.high - found.low)
    assert np.mean(inside) >= 0.85
    assert np.mean(widths) > 0.1 * mean


def test_without_differences_of_length_it_is_the_win_rate_with_a_tie_more() -> None:
    won = np.array([1.0] * 6 + [0.5] * 2 + [0.0] * 2)
    found = length_controlled(won, np.zeros(10))
    assert found.win_rate.value == pytest.approx(7.5 / 11, abs=1e-9)
    assert found.coefficient == 0.0
    table = np.stack([np.stack([won * 0, 1 - won], -1), np.stack([won, won * 0], -1)], axis=-2)
    logs, covariance = strengths(table)
    odds = found.win_rate.high / (1 - found.win_rate.high)
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert math.log(odds) == pytest.approx(logs[1] - logs[0] + t_quantile(10) * error, abs=1e-6)


def test_the_rival_has_the_rest() -> None:
    won, gaps = tournament(np.random.default_rng(2), num=1, prompts=80, truth=0.6, liking=1.0)
    ours = length_controlled(won[0], gaps[0]).win_rate
    theirs = length_controlled(1 - won[0], -gaps[0]).win_rate
    assert ours.value + theirs.value == pytest.approx(1.0, abs=1e-9)
    assert ours.low + theirs.high == pytest.approx(1.0, abs=1e-9)


def test_one_who_wins_everything_where_longer_has_a_finite_rate() -> None:
    gaps = np.linspace(-10, 10, 21)
    found = length_controlled((np.sign(gaps) + 1) / 2, gaps)
    assert found.win_rate.value == pytest.approx(0.5, abs=1e-9)
    assert 0 < found.win_rate.low < found.win_rate.high < 1
    assert 2 < found.coefficient < 50
    alone = length_controlled(np.ones(21), gaps).win_rate
    assert 0.5 < alone.low < alone.value < 1


def test_undecided_battles_are_left_out() -> None:
    won, gaps = np.array([1.0, np.nan, 0.0, 1.0]), np.array([5.0, 900.0, -3.0, 1.0])
    decided = ~np.isnan(won)
    assert length_controlled(won, gaps) == length_controlled(won[decided], gaps[decided])
    nothing = length_controlled(np.full(2, np.nan), np.zeros(2)).win_rate
    assert (nothing.low, nothing.value, nothing.high) == (0, 0.5, 1)
