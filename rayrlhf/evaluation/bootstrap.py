"""95% intervals over prompts, by drawing prompts."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayrlhf.evaluation.ratings import Interval

Floats = npt.NDArray[np.float64]

_RESAMPLES = 1000


def mean_interval(values: Sequence[float] | Floats, *, seed: int) -> Interval:
    """Return the mean of one value per prompt."""
    return ratio_interval(values, np.ones(len(values)), seed=seed)


def ratio_interval(
    numerators: Sequence[float] | Floats, denominators: Sequence[float] | Floats, *, seed: int
) -> Interval:
    """Return the sum of the numerators over that of the denominators, one of each per prompt.

    Percentile bootstrap: as many prompts again, with replacement.
    """
    above, below = (np.asarray(side, dtype=np.float64) for side in (numerators, denominators))
    if not below.sum():
        return Interval(0.0, 0.0, 0.0)
    num = len(above)
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=_RESAMPLES)
    sums = draws @ below
    kept = sums > 0
    return Interval(float(above.sum() / below.sum()), *bounds((draws @ above)[kept] / sums[kept]))


def bounds(values: Floats) -> tuple[float, float]:
    """Return the 2.5% and 97.5% quantiles."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def as_dict(interval: Interval) -> dict[str, float]:
    """Return the interval as results.json has it."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}
