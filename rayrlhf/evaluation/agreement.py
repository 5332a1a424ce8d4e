"""How well scores agree with people's ratings, and people with each other.

Pairs are all pairs of texts with a different mean rating; equal means are left out, and equal
scores count half. One human rater, judged by the mean of the others, is the ceiling.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROWS = 1024  # rows of the pair matrix at once: 8 MiB per 1,000 texts


@dataclass(frozen=True)
class PairAccuracy:
    """Share of pairs in the order of the ratings (0 to 1, equal scores half)."""

    accuracy: float
    num_pairs: int


def pair_accuracy(scores: Floats, ratings: Floats) -> PairAccuracy | None:
    """Compare scores (N,) with ratings (N,) over all pairs; None when every rating is equal."""
    right, num_pairs = 0.0, 0
    for start in range(0, len(scores), _ROWS):
        rows = slice(start, start + _ROWS)
        above = ratings[rows, None] > ratings[None, :]  # each unordered pair once
        gap = scores[rows, None] - scores[None, :]
        num_pairs += int(above.sum())
        right += float((above & (gap > 0)).sum()) + 0.5 * float((above & (gap == 0)).sum())
    return PairAccuracy(right / num_pairs, num_pairs) if num_pairs else None


def pair_accuracy_within(
    scores: Sequence[Floats], ratings: Sequence[Floats]
) -> PairAccuracy | None:
    """Compare only pairs within a group (the responses to one prompt)."""
    found = [pair_accuracy(s, r) for s, r in zip(scores, ratings, strict=True)]
    kept = [pairs for pairs in found if pairs is not None]
    num_pairs = sum(pairs.num_pairs for pairs in kept)
    if not num_pairs:
        return None
    return PairAccuracy(sum(p.accuracy * p.num_pairs for p in kept) / num_pairs, num_pairs)


def pearson(scores: Floats, ratings: Floats) -> float | None:
    """Return the linear correlation, or None when one side is constant."""
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(ratings) == 0:
        return None
    return float(np.corrcoef(scores, ratings)[0, 1])


def human_ceiling(
    ratings: Sequence[Sequence[float]], groups: Sequence[Sequence[int]] | None = None
) -> float | None:
    """Return the pair accuracy of one rater against the mean of the others.

    `ratings[i]` are the single ratings of text i; those of a group of texts compare, and without
    `groups` all do. The n-th rater of every text is taken as one rater; the result is the mean over
    all n that every text has. None with fewer than two raters.
    """
    num_raters = min((len(row) for row in ratings), default=0)
    if num_raters < 2:
        return None
    sums = np.array([sum(row) for row in ratings], dtype=np.float64)
    others = np.array([len(row) - 1 for row in ratings], dtype=np.float64)
    found = []
    for n in range(num_raters):
        one = np.array([row[n] for row in ratings], dtype=np.float64)
        rest = (sums - one) / others
        pairs = (
            pair_accuracy(one, rest)
            if groups is None
            else pair_accuracy_within([one[g] for g in groups], [rest[g] for g in groups])
        )
        if pairs is not None:
            found.append(pairs.accuracy)
    return float(np.mean(found)) if found else None


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Return Krippendorff's ordinal alpha: 1 full agreement, 0 chance, below 0 systematic dispute.

    `units[i]` are the values that different people gave to unit i, as many as there are; units with
    fewer than two say nothing. None without such units, or when all values are the same.
    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011).
    """
    paired = [np.asarray(values, dtype=np.float64) for values in units if len(values) > 1]
    if not paired:
        return None
    levels, index = np.unique(np.concatenate(paired), return_inverse=True)
    coincidences = np.zeros((len(levels), len(levels)))
    start = 0
    for values in paired:
        counts = np.bincount(index[start : start + len(values)], minlength=len(levels))
        pairs = np.outer(counts, counts) - np.diag(counts)
        coincidences += pairs / (len(values) - 1)
        start += len(values)
    totals = coincidences.sum(axis=1)
    # Distance of two levels: the values from one to the other, half of those at both ends.
    middles = np.cumsum(totals) - totals / 2
    distances = (middles[:, None] - middles[None, :]) ** 2
    expected = float((np.outer(totals, totals) * distances).sum())
    if expected == 0:
        return None
    return 1.0 - (float(totals.sum()) - 1.0) * float((coincidences * distances).sum()) / expected


def order_agreement(rankings: Sequence[Sequence[Sequence[float]]]) -> PairAccuracy | None:
    """Return the share of pairs that two people put in the same order, ties of either left out.

    `rankings[i]` are the ranks (K,) that different people gave to the responses of item i. Source:
    the agreement between labellers of InstructGPT, section 3.4. None without such pairs.
    """
    same, num_pairs = 0, 0
    for ranks in rankings:
        signs = [np.sign(np.subtract.outer(r, r))[np.triu_indices(len(r), 1)] for r in ranks]
        for one, other in itertools.combinations(signs, 2):
            both = (one != 0) & (other != 0)
            num_pairs += int(both.sum())
            same += int((one == other)[both].sum())
    return PairAccuracy(same / num_pairs, num_pairs) if num_pairs else None


def calibration(
    scores: Sequence[Floats], ratings: Sequence[Floats], *, num_bins: int = 10
) -> list[dict[str, float]]:
    """Return per bin of the predicted chance its mean, the observed share and the pairs.

    A reward model says that the one with the higher score is the better one with chance
    sigmoid(score gap), 0.5 to 1 (Bradley-Terry). Pairs are within a group; empty bins are left
    out. Source: arXiv:2204.05862, section 3.3.
    """
    predicted = np.zeros(num_bins)
    observed = np.zeros(num_bins)
    counts = np.zeros(num_bins)
    for group, truth in zip(scores, ratings, strict=True):
        for start in range(0, len(group), _ROWS):
            rows = slice(start, start + _ROWS)
            gap = group[rows, None] - group[None, :]
            kept = (gap > 0) & (truth[rows, None] != truth[None, :])
            chance = 1.0 / (1.0 + np.exp(-gap[kept]))
            right = (truth[rows, None] > truth[None, :])[kept]
            bins = np.minimum(((chance - 0.5) * 2 * num_bins).astype(np.int64), num_bins - 1)
            predicted += np.bincount(bins, weights=chance, minlength=num_bins)
            observed += np.bincount(bins, weights=right.astype(np.float64), minlength=num_bins)
            counts += np.bincount(bins, minlength=num_bins)
    return [
        {
            "predicted": float(predicted[i] / counts[i]),
            "observed": float(observed[i] / counts[i]),
            "num_pairs": int(counts[i]),
        }
        for i in range(num_bins)
        if counts[i]
    ]
