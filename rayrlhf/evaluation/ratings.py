"""Win rates and ratings of models from battles on the same prompts, with bootstrap intervals.

A battle is one prompt, two models and one judge: the higher score wins, equal scores are a tie and
count half for each. Battles on one prompt are not independent of each other, so the bootstrap
draws prompts, not battles.

Ratings are Bradley-Terry strengths, fitted to all battles at once, on Elo's scale: 400 points are
odds of 10 to 1. Unlike the running Elo update they do not depend on the order of the battles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ELO_POINTS_PER_DECADE = 400.0
ELO_OF_ANCHOR = 1000.0


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def outcomes(scores: Floats) -> Floats:
    """Return (N, M, M) from scores (N prompts, M models): 1 where i beats j, 0.5 tie, 0 loss."""
    gap = scores[:, :, None] - scores[:, None, :]
    return (np.sign(gap) + 1.0) / 2.0


def win_rate(
    scores: Floats, rival_scores: Floats, *, seed: int, num_resamples: int = 1000
) -> Interval:
    """Return the share of prompts (0 to 1, ties half) on which `scores` (N,) beats the rival."""
    won = outcomes(np.stack([scores, rival_scores], axis=1))[:, 0, 1]
    means = _resample(len(won), seed, num_resamples) @ won / len(won)
    return Interval(float(won.mean()), *_bounds(means))


def bradley_terry(
    wins: Floats, *, max_iterations: int = 10_000, tolerance: float = 1e-10
) -> Floats:
    """Return the maximum-likelihood log-strengths (..., M), of mean 0, for `wins` (..., M, M).

    `wins[i, j]` counts the battles that i won against j; a tie counts half on either side. With
    strengths p the chance that i beats j is p_i / (p_i + p_j). A model that won nothing, or
    everything, has no finite strength: ValueError.
    Source: minorise-maximise iterations, Hunter 2004 (doi:10.1214/aos/1079120141), eq. 3.
    """
    num_models = wins.shape[-1]
    games = wins + np.swapaxes(wins, -1, -2)
    off_diagonal = ~np.eye(num_models, dtype=bool)
    won = np.where(off_diagonal, wins, 0.0).sum(axis=-1)
    played = np.where(off_diagonal, games, 0.0)
    if np.any(won <= 0) or np.any(won >= played.sum(axis=-1)):
        raise ValueError(
            "a model won every battle or none, so its strength has no bound: add a tie to each pair"
        )
    strengths = np.ones(won.shape)
    for _ in range(max_iterations):
        pair_sums = strengths[..., :, None] + strengths[..., None, :]
        new = won / (played / pair_sums).sum(axis=-1)
        new /= np.exp(np.log(new).mean(axis=-1, keepdims=True))
        change = np.abs(np.log(new / strengths)).max()
        strengths = new
        if change < tolerance:
            break
    log_strengths: Floats = np.log(strengths)
    return log_strengths


def ratings(
    scores: Mapping[str, Sequence[float]], *, anchor: str, seed: int, num_resamples: int = 1000
) -> dict[str, Interval]:
    """Return each model's rating; `scores[model]` is one number per prompt, by one judge.

    The anchor is 1000 by definition. Each pair of models is given one more battle, a tie, so that
    a model that wins everything has a finite rating: with N prompts that moves a win rate by at
    most 0.5 / (N + 1).
    """
    names = list(scores)
    if len(names) < 2:
        return {name: Interval(ELO_OF_ANCHOR, ELO_OF_ANCHOR, ELO_OF_ANCHOR) for name in names}
    won = outcomes(np.array([scores[name] for name in names], dtype=np.float64).T)
    num_prompts, num_models = len(won), len(names)
    draws = np.concatenate([np.ones((1, num_prompts)), _resample(num_prompts, seed, num_resamples)])
    wins = (draws @ won.reshape(num_prompts, -1)).reshape(-1, num_models, num_models) + 0.5
    logs = bradley_terry(wins)
    elo = ELO_OF_ANCHOR + ELO_POINTS_PER_DECADE / np.log(10) * (
        logs - logs[:, [names.index(anchor)]]
    )
    return {name: Interval(float(elo[0, i]), *_bounds(elo[1:, i])) for i, name in enumerate(names)}


def _resample(num: int, seed: int, num_resamples: int) -> Floats:
    """Return (num_resamples, num) counts of a draw of `num` out of `num` with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num, np.full(num, 1.0 / num), size=num_resamples).astype(np.float64)


def _bounds(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
