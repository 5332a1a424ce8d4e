"""Win rates and ratings of models from battles on the same prompts, with 95% intervals.

A battle is one prompt, two models and one judge. A tie counts half for each.

Ratings are Bradley-Terry strengths, fitted to all battles at once, on Elo's scale: 400 points are
odds of 10 to 1. Unlike the running Elo update they do not depend on the order of the battles.
Ties are half wins, so that a difference of ratings is a win rate. A model with a parameter of its
own for ties (Davidson 1970, doi:10.1080/01621459.1970.10481082) would rank alike: where every pair
meets on every prompt, it sees wins plus half the ties of each model, too.

Battles on one prompt are not independent of each other. The intervals take the prompt as the unit:
they are those of the sandwich estimator, clustered by prompt, with Student's quantile. The
percentile bootstrap over prompts that is common here is too short for few prompts and strong models
(it covers about 91% in tournaments of 50 prompts with odds of up to 150 to 1), and a point for a
model that wins everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ELO_POINTS_PER_DECADE = 400.0
ELO_OF_ANCHOR = 1000.0
Z = 1.959964
"""Standard deviations on either side that hold 95% of a normal distribution."""


EVEN = 1e-6
"""Difference of two scores that is rounding."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def outcomes(scores: Floats) -> Floats:
    """Return (N, M, M) from scores (N prompts, M models): 1 where i beats j, 0.5 tie, 0 loss.

    A gap below `EVEN` is a tie: of the same answer in two batches a model's scores differ by as
    much.
    """
    gap = scores[:, :, None] - scores[:, None, :]
    return (np.sign(gap) * (np.abs(gap) > EVEN) + 1.0) / 2.0


def win_rate(scores: Floats, rival_scores: Floats) -> Interval:
    """Return the share of prompts (0 to 1, ties half) on which `scores` (N,) beats the rival."""
    return share_won(outcomes(np.stack([scores, rival_scores], axis=1))[:, 0, 1])


def share_won(won: Floats) -> Interval:
    """Return the mean of `won` (N,), each 0 to 1; a battle that is NaN was not decided.

    The interval is Wilson's, with the variance that was found in place of a coin's, which ties
    make smaller. Without a battle it is the whole range, around 0.5.
    """
    decided = won[~np.isnan(won)]
    num = len(decided)
    if num == 0:
        return Interval(0.5, 0.0, 1.0)
    rate, near = float(decided.mean()), (decided.sum() + 0.5) / (num + 1)
    spread = float(((decided - near) ** 2).sum() + _half_each(near))
    z2 = Z**2 / num * spread / ((num + 1) * near * (1 - near))
    centre = (rate + z2 / 2) / (1 + z2)
    half = np.sqrt(rate * (1 - rate) * z2 + z2**2 / 4) / (1 + z2)
    return Interval(rate, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def t_quantile(num_prompts: int) -> float:
    """Return how many standard errors hold 95%: Student's, with a prompt for a degree of freedom.

    Usual for variances from few clusters (Cameron and Miller 2015, doi:10.3368/jhr.50.2.317). By
    its expansion in 1 / degrees of freedom: right to 1% from 4 prompts on, to 0.01% from 11.
    """
    z, free = Z, max(1, num_prompts - 1)
    first = (z**3 + z) / (4 * free)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return z + first + second + third


def bradley_terry(wins: Floats, *, max_iterations: int = 1000, tolerance: float = 1e-10) -> Floats:
    """Return the maximum-likelihood log-strengths (..., M), of mean 0, for `wins` (..., M, M).

    `wins[i, j]` counts the battles that i won against j; a tie counts half on either side. With
    strengths p the chance that i beats j is p_i / (p_i + p_j). ValueError where there is no finite
    maximum: a model, or a group of them, won every battle against the others, or none.
    Newton's method, with the damping of arXiv:1703.04599 for logistic losses, whose curvature
    changes by at most the factor e where no two strengths part by more than 1.
    """
    num_models = wins.shape[-1]
    own = np.eye(num_models, dtype=bool)
    wins = np.where(own, 0.0, wins)
    games = wins + np.swapaxes(wins, -1, -2)
    reaches = (wins > 0) | own  # by a chain of wins: Ford 1957, Am. Math. Monthly 64
    for _ in range(num_models.bit_length()):
        reaches = reaches @ reaches
    if not reaches.all():
        raise ValueError(
            "a model, or a group of them, won every battle against the others or none, so its "
            "strength has no bound: add a tie to each pair"
        )
    won = wins.sum(axis=-1)
    logs = np.zeros(won.shape)
    for _ in range(max_iterations):
        chances = win_chances(logs)
        step = np.linalg.solve(
            _information(games, chances), (won - (games * chances).sum(axis=-1))[..., None]
        )[..., 0]
        reach = np.ptp(step, axis=-1, keepdims=True)
        logs = logs + step * np.log1p(reach) / np.maximum(reach, 1e-300)
        if reach.max() < tolerance:
            strengths: Floats = logs - logs.mean(axis=-1, keepdims=True)
            return strengths
    raise ValueError(
        f"no strengths after {max_iterations} iterations, as far apart as {reach.max():g}: the "
        "battles of some models are too few for a rating"
    )


def strengths(won: Floats) -> tuple[Floats, Floats]:
    """Return log-strengths (..., M) of mean 0 and their covariance (..., M, M).

    `won` (..., N, M, M) has for each of N prompts 1 where i beats j, 0.5 for a tie, 0 for a loss,
    NaN where nobody judged. Each pair is given one more battle, half of it won by either, so that
    a model that wins everything has a finite strength, and a finite interval: in the estimate that
    is a tie, in the variance it is what it says.
    """
    num_prompts, num_models = won.shape[-3], won.shape[-1]
    own = np.eye(num_models, dtype=bool)
    is_decided = ~(np.isnan(won) | own)
    more = np.where(own, 0.0, 1.0)
    wins = np.where(is_decided, won, 0.0).sum(axis=-3) + more / 2
    logs = bradley_terry(wins)
    chances = win_chances(logs)
    bread = np.linalg.inv(_information(wins + np.swapaxes(wins, -1, -2), chances))
    residuals = np.where(is_decided, won - chances[..., None, :, :], 0.0)
    scores = residuals.sum(axis=-1)  # (..., N, M): what each prompt adds to the gradient
    meat = np.swapaxes(scores, -1, -2) @ scores * (num_prompts / max(1, num_prompts - 1))
    meat = meat + _laplacian(_half_each(chances) * more)
    return logs, bread @ meat @ bread


def ratings(
    scores: Mapping[str, Sequence[float]] | Mapping[str, Floats], *, anchor: str
) -> dict[str, Interval]:
    """Return each model's rating; `scores[model]` is one number per prompt, by one judge.

    The anchor is 1000 by definition; the intervals are those of the distance to it.
    """
    table = np.array([scores[name] for name in scores], dtype=np.float64).T
    return elo(outcomes(table), list(scores), anchor=anchor)


def elo(won: Floats, models: Sequence[str], *, anchor: str) -> dict[str, Interval]:
    """Return each model's rating from `won` (N, M, M), as `strengths` takes it."""
    if len(models) < 2:
        return {name: Interval(ELO_OF_ANCHOR, ELO_OF_ANCHOR, ELO_OF_ANCHOR) for name in models}
    logs, covariance = strengths(won)
    at = list(models).index(anchor)
    variances = np.diagonal(covariance)
    errors = np.sqrt(np.maximum(0.0, variances + variances[at] - 2 * covariance[at]))
    points = ELO_POINTS_PER_DECADE / np.log(10)
    found = {}
    for i, name in enumerate(models):
        value = ELO_OF_ANCHOR + points * float(logs[i] - logs[at])
        half = 0.0 if i == at else points * t_quantile(len(won)) * float(errors[i])
        found[name] = Interval(value, value - half, value + half)
    return found


def win_chances(logs: Floats) -> Floats:
    """Return (..., M, M) from log-strengths (..., M): the chance that i beats j."""
    chances: Floats = 1.0 / (1.0 + np.exp(logs[..., None, :] - logs[..., :, None]))
    return chances


def _information(games: Floats, chances: Floats) -> Floats:
    """Return (..., M, M): Fisher's information, made invertible in the direction of all ones."""
    return _laplacian(games * chances * (1 - chances)) + 1.0 / games.shape[-1]


def _laplacian(weights: Floats) -> Floats:
    """Return (..., M, M) from weights of pairs: their sums on the diagonal, less themselves."""
    own = np.eye(weights.shape[-1], dtype=bool)
    between = np.where(own, 0.0, weights)
    return np.where(own, between.sum(axis=-1)[..., None], -between)


def _half_each(chances: Floats) -> Floats:
    """Return the squared error of half a win and half a loss."""
    errors: Floats = ((1 - chances) ** 2 + chances**2) / 2
    return errors
