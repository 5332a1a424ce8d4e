"""The win rate that a model would have if its answers were as long as those of its rival.

AlpacaEval 2 (arXiv:2404.04475): a logistic regression of the outcome on the difference of lengths,
read at a difference of 0. Departures:

1. No term for the difficulty of a prompt, which the paper estimates from many models' answers.
2. Jeffreys' prior (Firth 1993, doi:10.1093/biomet/80.1.27) in place of an L2 penalty chosen by
   cross-validation: it is finite where one side wins everything, has nothing to choose, and is,
   without lengths, the one battle won by halves that `ratings` adds to each pair.
3. The interval is that of the sandwich estimator, for the log-odds at a difference of 0.
4. Where one side is longer in every battle nothing is known about equal lengths, and said so.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rayrlhf.evaluation.ratings import Interval, t_quantile

Floats = npt.NDArray[np.float64]

_LONGEST_STEP = 1.0
_LEAST_SPREAD = 0.05
"""Of the lengths' column: below it, no battle is anywhere near equal lengths."""
_UNKNOWN = Interval(0.5, 0.0, 1.0)


@dataclass(frozen=True)
class LengthControlled:
    """A regression of wins on lengths."""

    win_rate: Interval
    """At equal lengths, 0 to 1, ties half."""
    coefficient: float
    """Log-odds that an answer gains as its length, in standard deviations of the difference of
    lengths, goes from equal to far above; 0 where lengths say nothing."""


def length_controlled(won: Floats, gaps: Floats) -> LengthControlled:
    """Return the win rate at equal lengths.

    `won` (N,) is 1, 0.5 for a tie, 0, or NaN for a battle that was not decided; `gaps` (N,) how
    much longer the answer was than the rival's (any unit). Where they tell nothing of equal
    lengths the interval is the whole range, around 0.5.
    """
    decided = ~np.isnan(won)
    if not decided.any() or not _tell(gaps[decided]):
        return LengthControlled(_UNKNOWN, 0.0)
    logit, error, coefficient = at_equal_lengths(won[decided], gaps[decided])
    if np.isnan(logit):
        return LengthControlled(_UNKNOWN, 0.0)
    z = t_quantile(int(decided.sum()))
    low, value, high = (float(_chance(logit + side * z * error)) for side in (-1, 0, 1))
    return LengthControlled(Interval(value, low, high), float(coefficient))


def at_equal_lengths(won: Floats, gaps: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the log-odds of a win at equal lengths, its standard error, and the coefficient.

    Each is (...,), for `won` and `gaps` (..., N) without NaN; NaN where nothing converged.
    """
    column, spread = _column(gaps)
    x = np.stack([np.ones_like(column), column], axis=-1)  # (..., N, 2)
    weights = np.zeros(won.shape[:-1] + (2,))
    ridge = np.where(spread > 0, 0.0, 1.0)[..., None] * np.diag([0.0, 1.0])
    for _ in range(200):
        chances = _chance((x @ weights[..., None])[..., 0])
        slopes = chances * (1 - chances)
        inverse = np.linalg.inv(_gram(x, slopes) + ridge)
        leverage = slopes * np.einsum("...ni,...ij,...nj->...n", x, inverse, x)
        pull = won - chances + leverage * (0.5 - chances)
        step = np.einsum("...ij,...nj,...n->...i", inverse, x, pull)
        weights = weights + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        if np.abs(step).max() < 1e-10:
            break
    is_found = np.abs(step).max(axis=-1) < 1e-6
    bread = np.linalg.inv(_gram(x, slopes * (1 + leverage)) + ridge)
    num = won.shape[-1]
    half_each = leverage * ((1 - chances) ** 2 + chances**2) / 2
    meat = _gram(x, (won - chances) ** 2 * (num / max(1, num - 1)) + half_each)
    errors = np.sqrt((bread @ meat @ bread)[..., 0, 0])
    logits, coefficients = (np.where(is_found, weights[..., i], np.nan) for i in (0, 1))
    return logits, errors, coefficients


def _column(gaps: Floats) -> tuple[Floats, Floats]:
    """Return the regression's column of lengths (..., N) and the spread of `gaps` (..., 1).

    Without a spread there is no length to control for: the column is 0, and so its coefficient.
    """
    spread = gaps.std(axis=-1, keepdims=True)
    return np.where(spread > 0, np.tanh(gaps / np.where(spread > 0, spread, 1.0)), 0.0), spread


def _tell(gaps: Floats) -> bool:
    """Whether the lengths are equal throughout, or some battles are near equal lengths."""
    column, _ = _column(gaps)
    return not gaps.any() or float(column.std()) > _LEAST_SPREAD


def _gram(x: Floats, weights: Floats) -> Floats:
    """Return the sum of w x x' over the rows: (..., 2, 2) from (..., N, 2) and (..., N)."""
    return np.swapaxes(x, -1, -2) @ (x * weights[..., None])


def _chance(logit: Floats) -> Floats:
    chance: Floats = 1.0 / (1.0 + np.exp(-logit))
    return chance
