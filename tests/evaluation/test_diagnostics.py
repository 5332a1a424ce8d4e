"""Where the reward model is wrong: hand-worked pairs, and made-up models with a known fault."""

import numpy as np
import pytest

from rayrlhf.evaluation import diagnostics
from rayrlhf.evaluation.agreement import human_ceiling, pair_accuracy
from rayrlhf.evaluation.diagnostics import (
    RatedPairs,
    accuracy_by,
    calibration_error,
    centred,
    ensemble_agreement,
    length_bias,
    rated_pairs,
    right,
    right_people,
)


def test_pairs_are_those_of_the_accuracy_and_of_the_human_ceiling() -> None:
    rng = np.random.default_rng(0)
    single = rng.integers(-4, 5, size=(60, 5))
    ratings, scores = single.mean(axis=1), rng.integers(0, 9, size=60).astype(float)
    pairs = rated_pairs(ratings, [list(range(60))])
    found = pair_accuracy(scores, ratings)
    assert found is not None and len(pairs.better) == found.num_pairs
    assert right(pairs.gap(scores)).mean() == pytest.approx(found.accuracy)
    everyone = RatedPairs(*np.triu_indices(60, 1))
    people = right_people(everyone, single.tolist())
    ceiling = human_ceiling(single.tolist())
    # The ceiling is the mean over raters: those with more ties by the others weigh a bit less here.
    assert people[0].sum() / people[1].sum() == pytest.approx(ceiling, abs=1e-3)
    assert not right_people(pairs, [[1.0]] * 60).any()
    assert not right_people(pairs, []).any()


def test_people_by_hand() -> None:
    """Of three people, two say that the first is better, one the other way; each against others.

    Rater 1: 2 > 0, others' means 1.5 > 1: right. Rater 2: 3 > 0, 1 = 1: no truth. Rater 3: 0 < 2,
    2.5 > 0: wrong. One of two.
    """
    pairs = RatedPairs(np.array([0]), np.array([1]))
    assert right_people(pairs, [[2, 3, 0], [0, 0, 2]]).tolist() == [[1], [2]]


def test_pairs_stay_within_groups_and_are_sampled_when_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratings = np.array([3.0, 1.0, 1.0, 5.0, 4.0])
    pairs = rated_pairs(ratings, [[0, 1, 2], [3, 4]])
    assert sorted(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (3, 4),
    ]
    monkeypatch.setattr(diagnostics, "MAX_PAIRS", 2000)
    many = np.random.default_rng(1).normal(size=400)
    sample = rated_pairs(many, [list(range(200)), list(range(200, 400))])
    assert len(sample.better) == pytest.approx(2000, rel=0.05)
    assert (sample.gap(many) > 0).all()
    assert ((sample.better < 200) == (sample.worse < 200)).all()


def test_accuracy_in_fifths() -> None:
    values, correct = np.arange(10.0), np.array([0, 0, 1, 0, 1, 1, 1, 1, 1, 1.0])
    people = np.array([[0, 3, *[1] * 8], [0, 3, *[2] * 8]])
    found = accuracy_by(values, correct, people)
    assert [b["pair_accuracy"] for b in found] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert [b["human_pair_accuracy"] for b in found] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert [(b["low"], b["high"], b["num_pairs"]) for b in found[:2]] == [(0, 1, 2), (2, 3, 2)]
    same = accuracy_by(np.ones(4), np.array([1, 1, 1, 0.0]), np.zeros((2, 4)))
    assert [(b["pair_accuracy"], b["human_pair_accuracy"]) for b in same] == [(0.75, None)]


def test_a_model_that_likes_length_is_found_out() -> None:
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=500)
    lengths = np.exp(rng.normal(size=500) + 0.3 * ratings)
    pairs = rated_pairs(ratings, [list(range(500))])
    fair = length_bias(ratings + rng.normal(size=500), ratings, lengths, pairs)
    assert fair["partial"] == pytest.approx(0, abs=0.1)
    biased = length_bias(ratings + 0.5 * lengths, ratings, lengths, pairs)
    assert biased["partial"] is not None and biased["partial"] > 0.9
    longer, shorter = (biased[f"pair_accuracy_better_{side}"] for side in ("longer", "shorter"))
    assert longer == 1.0 and shorter is not None and shorter < 0.8
    # By the definition: correlation of what is left of both after a regression on the rating.
    line = np.polyfit(ratings, ratings + 0.5 * lengths, 1)
    rest = ratings + 0.5 * lengths - np.polyval(line, ratings)
    other = lengths - np.polyval(np.polyfit(ratings, lengths, 1), ratings)
    assert biased["partial"] == pytest.approx(np.corrcoef(rest, other)[0, 1])


def test_an_ensemble_is_right_where_it_agrees() -> None:
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=300)
    noise = rng.random(300) * 3  # some texts are hard
    scores = np.stack([5 + 2 * (ratings + noise * rng.normal(size=300)) for _ in range(4)])
    pairs = rated_pairs(ratings, [list(range(300))])
    found = ensemble_agreement(scores, pairs)
    assert found["num_members"] == 4 and len(found["member_pair_accuracy"]) == 4
    assert found["pair_accuracy"] > max(found["member_pair_accuracy"])
    accuracies = [third["pair_accuracy"] for third in found["by_disagreement"]]
    assert accuracies[0] > accuracies[1] > accuracies[2]
    assert found["error_correlation"] > 0.05
    # Members that differ in scale and origin alone agree.
    same = ensemble_agreement(np.stack([ratings, 7 - 3 * -ratings]), pairs)
    assert same["disagreement"] == pytest.approx(0, abs=1e-12) and same["pair_accuracy"] == 1.0


def test_calibration_error_and_centring_by_hand() -> None:
    bins = [
        {"predicted": 0.6, "observed": 0.5, "num_pairs": 30},
        {"predicted": 0.9, "observed": 1.0, "num_pairs": 10},
    ]
    assert calibration_error(bins) == pytest.approx(0.1)
    assert calibration_error([]) is None
    assert centred(np.array([1.0, 3.0, 10.0]), [[0, 1], [2]]).tolist() == [-1.0, 1.0, 0.0]
