"""Agreement with ratings: hand-worked pairs, and the fast count against the plain one."""

import itertools

import numpy as np
import pytest

from rayrlhf.evaluation import agreement
from rayrlhf.evaluation.agreement import (
    calibration,
    human_ceiling,
    krippendorff_alpha,
    order_agreement,
    pair_accuracy,
    pair_accuracy_within,
    pearson,
)


def test_pairs_by_hand() -> None:
    """Ratings 1 2 2 3: five pairs; scores 0 1 5 1: right 4 times, one tie of scores, none wrong
    but (5, 1): 0<1, 0<5, 0<1 right; 1 against 1 is a tie; 5 against 1 is wrong."""
    found = pair_accuracy(np.array([0.0, 1.0, 5.0, 1.0]), np.array([1.0, 2.0, 2.0, 3.0]))
    assert found is not None
    assert found.num_pairs == 5
    assert found.accuracy == pytest.approx(3.5 / 5)


def test_fast_count_equals_plain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_ROWS", 7)
    rng = np.random.default_rng(0)
    scores, ratings = rng.integers(0, 6, size=(2, 40)).astype(float)
    right = total = 0.0
    for i, j in itertools.combinations(range(40), 2):
        if ratings[i] != ratings[j]:
            total += 1
            right += (
                0.5
                if scores[i] == scores[j]
                else ((scores[i] > scores[j]) == (ratings[i] > ratings[j]))
            )
    found = pair_accuracy(scores, ratings)
    assert found is not None
    assert (found.num_pairs, found.accuracy) == (total, pytest.approx(right / total))


def test_equal_ratings_leave_no_pair() -> None:
    assert pair_accuracy(np.arange(3.0), np.ones(3)) is None
    assert pair_accuracy_within([np.arange(3.0)], [np.ones(3)]) is None


def test_pairs_within_groups_ignore_the_rest() -> None:
    found = pair_accuracy_within(
        [np.array([2.0, 1.0]), np.array([9.0, 8.0, 7.0])],
        [np.array([-1.0, -2.0]), np.array([-3.0, -2.0, -1.0])],
    )
    assert found is not None
    assert (found.num_pairs, found.accuracy) == (4, 0.25)


def test_pearson_by_hand() -> None:
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1)
    assert pearson(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert pearson(np.ones(3), np.arange(3.0)) is None


def test_human_ceiling_of_raters_who_agree_is_1_and_by_hand() -> None:
    assert human_ceiling([[1, 1, 1], [2, 2, 2], [3, 3, 3]]) == 1.0
    # rater 1 says 0 < 4, the other 2 > 1: wrong; and the other way round: wrong.
    assert human_ceiling([[0, 2], [4, 1]]) == 0.0
    assert human_ceiling([[1], [2]]) is None
    assert human_ceiling([]) is None
    # Ranks of people compare within an item only: the worst of one may beat the best of another.
    ranked = [[2, 2], [1, 1], [1, 2], [2, 1]]
    assert human_ceiling(ranked, [[0, 1]]) == 1.0
    assert human_ceiling(ranked, [[0, 1], [2, 3]]) == 0.5


def test_calibration_of_a_model_that_is_always_sure_and_half_right() -> None:
    bins = calibration(
        [np.array([50.0, 0.0]), np.array([50.0, 0.0])], [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    )
    assert bins == [{"predicted": pytest.approx(1.0), "observed": 0.5, "num_pairs": 2}]


def test_calibration_of_scores_that_are_log_odds_is_on_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(scale=2, size=20_000)
    won = rng.random(20_000) < 1 / (1 + np.exp(-gaps))
    bins = calibration(
        [np.array([gap, 0.0]) for gap in gaps],
        [np.array([1.0, 0.0]) if w else np.array([0.0, 1.0]) for w in won],
    )
    assert sum(b["num_pairs"] for b in bins) == 20_000
    assert all(b["observed"] == pytest.approx(b["predicted"], abs=0.05) for b in bins)


def test_alpha_of_krippendorffs_own_example() -> None:
    """Computing Krippendorff's Alpha-Reliability (2011), four observers: ordinal, 0.815."""
    none = None
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, none, none, none],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, none, 3],
        [none, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, none],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, none],
    ]
    units = [[float(v) for v in unit if v is not None] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2], [3, 3, 3]]) == pytest.approx(1.0)
    assert krippendorff_alpha([]) is krippendorff_alpha([[1], [2]]) is None
    assert krippendorff_alpha([[2, 2], [2, 2]]) is None
    opposite = krippendorff_alpha([[1, 3], [2, 2], [3, 1]])
    assert opposite is not None and opposite < -0.5
    rng = np.random.default_rng(0)
    chance = krippendorff_alpha(rng.integers(1, 6, size=(4000, 2)).tolist())
    assert chance == pytest.approx(0, abs=0.05)


def test_order_agreement_by_hand() -> None:
    """Of three pairs one is tied by a person, the others are the wrong way round."""
    found = order_agreement([[[1, 2, 3], [2, 2, 1]], [[1, 2]]])
    assert found is not None and (found.num_pairs, found.accuracy) == (2, 0.0)
    three = order_agreement([[[1, 2], [1, 2], [2, 1]]])
    assert three is not None and (three.num_pairs, three.accuracy) == (3, pytest.approx(1 / 3))
    assert order_agreement([[[1, 1], [1, 2]]]) is None
