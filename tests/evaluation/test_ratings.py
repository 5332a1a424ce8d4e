"""Ratings and win rates: worked by hand, by other implementations, and by simulated tournaments."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rayrlhf.evaluation.ratings import (
    Z,
    bradley_terry,
    outcomes,
    ratings,
    share_won,
    strengths,
    win_chances,
    win_rate,
)

Floats = npt.NDArray[np.float64]


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


def likeliest(won: Floats) -> Floats:
    """Maximise the likelihood of battles (N, M, M) with ties, one by one, by quasi-Newton."""
    battles = torch.tensor(won)
    logs = torch.zeros(won.shape[-1], dtype=torch.float64, requires_grad=True)
    upper = torch.triu(torch.ones(won.shape[-2:], dtype=torch.float64), 1)
    optimizer = torch.optim.LBFGS(
        [logs],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        gaps = logs[:, None] - logs[None, :]
        log_win = torch.nn.functional.logsigmoid(gaps)
        total = -((battles * log_win + (1 - battles) * log_win.T) * upper).sum()
        total.backward()
        return total.detach()

    optimizer.step(loss)  # type: ignore[arg-type, no-untyped-call]
    found: Floats = (logs - logs.mean()).detach().numpy()
    return found


@pytest.mark.parametrize("num_models", [2, 3, 6])
def test_random_tables_with_ties_have_their_likeliest_strengths(num_models: int) -> None:
    rng = np.random.default_rng(num_models)
    for num_prompts in (9, 40):
        scores = np.round(rng.normal(size=(num_prompts, num_models)), 0)
        scores += np.linspace(0, 1, num_models).round()
        won = outcomes(scores)
        assert (won == 0.5).mean() > 0.2
        assert bradley_terry(won.sum(axis=0)) == pytest.approx(likeliest(won), abs=1e-6)


@pytest.mark.parametrize(
    ("doubled", "logs"),
    [
        ([[0, 8, 6], [3, 0, 1], [1, 1, 0]], [0.878747176, -0.208620497, -0.670126679]),
        (
            [[0, 6, 9, 11, 1], [2, 0, 11, 3, 4], [10, 5, 0, 10, 3], [5, 8, 7, 0, 1]]
            + [[10, 9, 10, 6, 0]],
            [-0.074845158, -0.29766835, -0.301864316, -0.424448952, 1.098826775],
        ),
    ],
)
def test_strengths_are_those_of_choix(doubled: list[list[int]], logs: list[float]) -> None:
    """choix 0.4.1: opt_pairwise(alpha=0), given each win twice and each tie once either way."""
    assert bradley_terry(np.array(doubled) / 2) == pytest.approx(logs, abs=1e-6)


def test_a_model_that_never_won_has_no_strength() -> None:
    with pytest.raises(ValueError, match="no bound"):
        bradley_terry(np.array([[0.0, 4.0], [0.0, 0.0]]))


def test_a_group_that_never_won_against_the_others_has_no_strengths() -> None:
    table = np.array([[0.0, 2, 3, 3], [2, 0, 3, 3], [0, 0, 0, 2], [0, 0, 2, 0]])
    with pytest.raises(ValueError, match="a group of them, won every battle"):
        bradley_terry(table)


def test_elo_of_ten_to_one_is_400_points_above_the_anchor() -> None:
    """10 wins, 1 loss; the tie that is added makes 10.5 to 1.5, odds of 7."""
    rated = ratings({"sft": [0.0] * 11, "ppo": [1.0] * 10 + [-1.0]}, anchor="sft")
    assert rated["ppo"].value == pytest.approx(1000 + 400 * math.log10(7), abs=1e-6)
    assert rated["sft"].value == rated["sft"].low == rated["sft"].high == 1000
    assert rated["ppo"].low < rated["ppo"].value < rated["ppo"].high


def test_a_model_that_wins_everything_has_a_finite_rating() -> None:
    rated = ratings({"base": [0.0] * 50, "sft": [1.0] * 50, "ppo": [2.0] * 50}, anchor="sft")
    assert rated["base"].value < 1000 < rated["ppo"].value < 3000
    assert rated["ppo"].value - 1000 == pytest.approx(1000 - rated["base"].value, abs=1e-6)


def test_equal_models_are_all_1000() -> None:
    rated = ratings({"base": [1.0] * 5, "sft": [1.0] * 5}, anchor="sft")
    assert rated["base"].value == pytest.approx(1000, abs=1e-6)


def test_one_model_alone_is_the_anchor() -> None:
    assert ratings({"base": [1.0]}, anchor="base")["base"].value == 1000


def test_win_rate_counts_ties_half() -> None:
    rate = win_rate(np.array([1.0, 1.0, 0.0, 3.0]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert rate.value == 2.5 / 4
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_win_rate_interval_is_that_of_a_binomial_share() -> None:
    """Wilson's of 140 of 200: 0.6332 to 0.7593; the variance found here is 199/200 of a coin's."""
    rate = win_rate(np.array([1.0] * 140 + [-1.0] * 60), np.zeros(200))
    assert (rate.low, rate.high) == pytest.approx((0.6332, 0.7593), abs=2e-3)


def test_ties_make_a_share_more_certain() -> None:
    tied, fought = share_won(np.full(100, 0.5)), share_won(np.repeat([0.0, 1.0], 50))
    assert tied.value == fought.value == 0.5
    assert tied.high - tied.low < 0.3 * (fought.high - fought.low)


def test_undecided_battles_are_left_out() -> None:
    won = np.array([1.0, np.nan, 0.0, 0.5, np.nan, 1.0])
    assert share_won(won) == share_won(won[~np.isnan(won)])
    assert share_won(np.full(3, np.nan)).value == 0.5
    assert (share_won(np.full(3, np.nan)).low, share_won(np.full(3, np.nan)).high) == (0, 1)

    scores = np.random.default_rng(0).normal(size=(30, 3)) + [0, 0.5, 1]
    holes = outcomes(scores)
    holes[20:] = np.nan
    logs, covariance = strengths(holes)
    whole_logs, whole_covariance = strengths(holes[:20])
    assert logs == pytest.approx(whole_logs, abs=1e-9)
    assert covariance == pytest.approx(whole_covariance * (30 / 29) / (20 / 19), rel=0.02)


def test_a_model_that_wins_everything_has_intervals_that_are_no_points() -> None:
    """Against 50 losses the true odds may well be 20 to 1, and the interval says so."""
    rated = ratings({"sft": [0.0] * 50, "ppo": [1.0] * 50}, anchor="sft")["ppo"]
    assert rated.low < 1000 + 400 * math.log10(20) < rated.value < rated.high
    rate = win_rate(np.ones(50), np.zeros(50))
    assert rate.value == rate.high == 1.0
    assert rate.low == pytest.approx(0.929, abs=0.005)  # Wilson's


TOURNAMENTS = [
    # prompts, log-strength of the best (the worst has its negative), models, share of ties
    (200, 1.0, 4, 0.2),
    (50, 1.0, 4, 0.2),
    (25, 1.0, 4, 0.2),
    (50, 1.0, 6, 0.5),
    (50, 2.5, 4, 0.0),
]


@pytest.mark.parametrize(("num_prompts", "best", "num_models", "ties"), TOURNAMENTS)
def test_intervals_cover_the_truth_in_95_of_100_tournaments(
    num_prompts: int, best: float, num_models: int, ties: float
) -> None:
    """Answers have a quality of their own on each prompt, so that its battles hang together.

    Gumbel noise on the strengths makes the chances of Bradley-Terry.
    """
    rng = np.random.default_rng(num_prompts)
    true = np.linspace(-best, best, num_models)
    num = 2000
    quality = true + rng.gumbel(size=(num, num_prompts, num_models))
    won = (quality[..., :, None] > quality[..., None, :]).astype(np.float64)
    tied = np.triu(rng.random(won.shape) < ties)
    won[tied | np.swapaxes(tied, -1, -2)] = 0.5
    chances = (1 - ties) * win_chances(true) + ties / 2
    truth = bradley_terry(chances)  # of a table without noise

    logs, covariance = strengths(won)
    variances = np.diagonal(covariance, axis1=-2, axis2=-1)
    errors = np.sqrt(variances[:, 1:] + variances[:, :1] - 2 * covariance[:, 0, 1:])
    off = (logs - logs[:, :1] - (truth - truth[0]))[:, 1:]
    assert 0.93 <= (np.abs(off) <= Z * errors).mean() <= 0.97

    rates = [share_won(row) for row in won[:, :, 0, 1]]
    assert 0.93 <= np.mean([r.low <= chances[0, 1] <= r.high for r in rates]) <= 0.97
