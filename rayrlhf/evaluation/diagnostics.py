"""Where the reward model is wrong: by how clear the case is, by length, by what an ensemble says.

Everything is about pairs of texts with different ratings, the better one first. Lengths are tokens
of the response.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrlhf.evaluation.agreement import pearson

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_PAIRS = 2**20
"""Of more pairs than that a random sample of this size is looked at."""
_NUM_BINS = 5


@dataclass(frozen=True)
class RatedPairs:
    """M pairs of texts of one source; the rating of `better` is the higher one."""

    better: Ints
    worse: Ints

    def gap(self, values: Floats) -> Floats:
        """Return (M,) the value of the better text minus that of the worse one."""
        gap: Floats = values[self.better] - values[self.worse]
        return gap


def rated_pairs(ratings: Floats, groups: Sequence[Sequence[int]], *, seed: int = 0) -> RatedPairs:
    """Return the pairs within each group whose ratings differ, at most MAX_PAIRS."""
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    room = MAX_PAIRS / max(1, int((sizes * (sizes - 1) // 2).sum()))
    rng = np.random.default_rng(seed)
    parts = []
    for group in groups:
        members = np.array(group, dtype=np.int64)
        if room >= 1:
            i, j = np.triu_indices(len(members), 1)
        else:
            i, j = rng.integers(0, len(members), (2, round(room * len(members) ** 2 / 2)))
        parts.append((members[i], members[j]))
    first, second = (np.concatenate(side) for side in zip(*parts, strict=True))
    gap = ratings[first] - ratings[second]
    first, second, gap = first[gap != 0], second[gap != 0], gap[gap != 0]
    return RatedPairs(np.where(gap > 0, first, second), np.where(gap > 0, second, first))


def right(gaps: Floats) -> Floats:
    """Return 1 for a better text with the higher score, 0.5 for equal scores, else 0."""
    found: Floats = np.heaviside(gaps, 0.5)
    return found


def right_people(pairs: RatedPairs, single_ratings: Sequence[Sequence[float]]) -> Floats:
    """Return (2, M): how many people are right by the mean of the others, and out of how many.

    The n-th rating of every text is taken for one person's, as in `human_ceiling`; who the others'
    means don't tell the two apart for is not counted. Zeros with fewer than two ratings of a text.
    """
    num_raters = min((len(row) for row in single_ratings), default=0)
    total, judged = np.zeros((2, len(pairs.better)))
    if num_raters < 2:
        return np.stack([total, judged])
    sums = np.array([sum(row) for row in single_ratings], dtype=np.float64)
    counts = np.array([len(row) for row in single_ratings], dtype=np.float64)
    for n in range(num_raters):
        one = np.array([row[n] for row in single_ratings], dtype=np.float64)
        truth = np.sign(pairs.gap((sums - one) / (counts - 1)))
        total += np.where(truth == 0, 0.0, right(pairs.gap(one) * truth))
        judged += truth != 0
    return np.stack([total, judged])


def accuracy_by(values: Floats, correct: Floats, people: Floats) -> list[dict[str, float | None]]:
    """Return the accuracy in fifths of the pairs by a value of theirs, the lowest first.

    `people` is that of `right_people`. Each bin has `low`, `high` and `mean` of the value,
    `pair_accuracy`, `human_pair_accuracy` and `num_pairs`; of values that are often the same there
    may be fewer bins.
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _NUM_BINS + 1)))
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))
    found: list[dict[str, float | None]] = []
    for number in range(max(1, len(edges) - 1)):
        mine = bins == number
        if not mine.any():
            continue
        human, judged = people[:, mine].sum(axis=1)
        found.append(
            {
                "low": float(values[mine].min()),
                "high": float(values[mine].max()),
                "mean": float(values[mine].mean()),
                "pair_accuracy": float(correct[mine].mean()),
                "human_pair_accuracy": float(human / judged) if judged else None,
                "num_pairs": int(mine.sum()),
            }
        )
    return found


def length_bias(
    scores: Floats, ratings: Floats, lengths: Floats, pairs: RatedPairs
) -> dict[str, float | None]:
    """Say how much of the score is length: correlations, and accuracy by which text is longer.

    `pearson` of score and length; `rating_pearson` of rating and length, what a perfect model has;
    `partial` of score and length with the rating held fixed, 0 without a bias.
    """
    score, rating, both = (
        pearson(scores, lengths),
        pearson(ratings, lengths),
        pearson(scores, ratings),
    )
    partial = None
    if score is not None and rating is not None and both is not None:
        rest = (1 - rating**2) * (1 - both**2)
        partial = (score - rating * both) / rest**0.5 if rest > 1e-12 else None
    correct, longer = right(pairs.gap(scores)), pairs.gap(lengths)
    return {
        "pearson": score,
        "rating_pearson": rating,
        "partial": partial,
        "pair_accuracy_better_longer": _mean(correct[longer > 0]),
        "pair_accuracy_better_shorter": _mean(correct[longer < 0]),
        "num_better_longer": int((longer > 0).sum()),
        "num_better_shorter": int((longer < 0).sum()),
    }


def ensemble_agreement(scores: Floats, pairs: RatedPairs) -> dict[str, Any]:
    """Say what members agree on; `scores` are (members, texts), put on one scale per member.

    `disagreement` is the standard deviation over the members of a text's score, in standard
    deviations of the scores, mean over the texts. Pairs are sorted by that of their gap into
    thirds: a useful ensemble is right most where it agrees. `error_correlation` is Pearson's r of
    a pair's disagreement and its being wrong by the mean of the members.
    """
    spread = scores.std(axis=1, keepdims=True)
    scaled = (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    correct = right(pairs.gap(scaled.mean(axis=0)))
    disagreement = np.std([pairs.gap(member) for member in scaled], axis=0)
    thirds = np.array_split(np.argsort(disagreement, kind="stable"), 3)
    return {
        "num_members": len(scores),
        "pair_accuracy": float(correct.mean()),
        "member_pair_accuracy": [float(right(pairs.gap(member)).mean()) for member in scaled],
        "disagreement": float(scaled.std(axis=0).mean()),
        "error_correlation": pearson(disagreement, 1.0 - correct),
        "by_disagreement": [
            {"pair_accuracy": _mean(correct[third]), "num_pairs": len(third)} for third in thirds
        ],
    }


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float | None:
    """Return the expected calibration error: mean |certainty - share right| over all pairs, 0 to 1.

    Source: arXiv:1706.04599, eq. 3, over the bins of `calibration`.
    """
    total = sum(b["num_pairs"] for b in bins)
    if not total:
        return None
    return sum(b["num_pairs"] * abs(b["predicted"] - b["observed"]) for b in bins) / total


def centred(values: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    """Return the values minus the mean of their group."""
    result = values.astype(np.float64)
    for group in groups:
        members = list(group)
        result[members] -= result[members].mean()
    return result


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None
