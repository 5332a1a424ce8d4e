"""Ratings and win rates against values worked by hand."""

import math

import numpy as np
import pytest

from rayrlhf.evaluation.ratings import bradley_terry, outcomes, ratings, win_rate


def test_outcomes_of_win_tie_and_loss() -> None:
    won = outcomes(np.array([[2.0, 1.0, 2.0]]))
    assert won[0].tolist() == [[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]]


def test_two_models_have_the_odds_of_their_battles() -> None:
    logs = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]))
    assert logs[0] - logs[1] == pytest.approx(math.log(3), abs=1e-8)


def test_strengths_that_made_the_wins_are_found_again() -> None:
    strengths = np.array([1.0, 2.0, 5.0])
    wins = 100 * strengths[:, None] / (strengths[:, None] + strengths[None, :])
    logs = bradley_terry(wins)
    assert logs - logs[0] == pytest.approx(np.log(strengths), abs=1e-7)


def test_a_batch_of_tables_is_fitted_like_each_alone() -> None:
    tables = np.random.default_rng(0).uniform(1, 9, size=(3, 4, 4))
    assert bradley_terry(tables) == pytest.approx(
        np.stack([bradley_terry(table) for table in tables]), abs=1e-8
    )


def test_a_model_that_never_won_has_no_strength() -> None:
    with pytest.raises(ValueError, match="no bound"):
        bradley_terry(np.array([[0.0, 4.0], [0.0, 0.0]]))


def test_elo_of_ten_to_one_is_400_points_above_the_anchor() -> None:
    """10 wins, 1 loss; the tie that is added makes 10.5 to 1.5, odds of 7."""
    rated = ratings({"sft": [0.0] * 11, "ppo": [1.0] * 10 + [-1.0]}, anchor="sft", seed=0)
    assert rated["ppo"].value == pytest.approx(1000 + 400 * math.log10(7), abs=1e-6)
    assert rated["sft"].value == rated["sft"].low == rated["sft"].high == 1000
    assert rated["ppo"].low < rated["ppo"].value < rated["ppo"].high


def test_a_model_that_wins_everything_has_a_finite_rating() -> None:
    rated = ratings(
        {"base": [0.0] * 50, "sft": [1.0] * 50, "ppo": [2.0] * 50}, anchor="sft", seed=0
    )
    assert rated["base"].value < 1000 < rated["ppo"].value < 3000
    assert rated["ppo"].value - 1000 == pytest.approx(1000 - rated["base"].value, abs=1e-6)


def test_equal_models_are_all_1000() -> None:
    rated = ratings({"base": [1.0] * 5, "sft": [1.0] * 5}, anchor="sft", seed=0)
    assert rated["base"].value == pytest.approx(1000, abs=1e-6)


def test_one_model_alone_is_the_anchor() -> None:
    assert ratings({"base": [1.0]}, anchor="base", seed=0)["base"].value == 1000


def test_win_rate_counts_ties_half() -> None:
    rate = win_rate(np.array([1.0, 1.0, 0.0, 3.0]), np.array([0.0, 1.0, 1.0, 0.0]), seed=0)
    assert rate.value == 2.5 / 4
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_win_rate_interval_is_that_of_a_binomial_share() -> None:
    scores = np.array([1.0] * 140 + [-1.0] * 60)
    rate = win_rate(scores, np.zeros(200), seed=3, num_resamples=4000)
    spread = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert rate.low == pytest.approx(0.7 - spread, abs=0.012)
    assert rate.high == pytest.approx(0.7 + spread, abs=0.012)


def test_the_seed_decides_the_interval() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    first, again = (win_rate(scores, np.zeros(50), seed=5) for _ in range(2))
    assert first == again
