"""Best-of-n against every subset; peaks, falls and Gao's shapes by hand."""

import itertools
import math

import numpy as np
import pytest

from rayrlhf.evaluation.best_of_n import (
    best_of_n,
    best_of_n_weights,
    fit,
    kl_of_best_of_n,
    powers_of_two,
)
from rayrlhf.evaluation.overoptimisation import Point, Scale, curve


def test_kl_of_best_of_n() -> None:
    assert kl_of_best_of_n(1) == 0.0
    assert kl_of_best_of_n(2) == pytest.approx(math.log(2) - 0.5)
    # By its definition: the best of n of a continuous reward has the density n u^(n-1) on [0, 1].
    u = (np.arange(200_000) + 0.5) / 200_000
    density = 8 * u**7
    assert kl_of_best_of_n(8) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)


def test_estimate_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 7))
    for n in range(1, 8):
        subsets = [list(subset) for subset in itertools.combinations(range(7), n)]
        naive = np.mean([gold[subset][np.argmax(proxy[subset])] for subset in subsets])
        assert best_of_n(proxy[None], gold[None], n)[0] == pytest.approx(naive)
        assert best_of_n_weights(proxy, n).sum() == pytest.approx(1.0)


def test_equal_samples_are_equally_likely() -> None:
    # Pairs of (0, 5, 5): two hold one of the best, which come up for each in one, and in half of
    # the third pair, which holds both.
    assert best_of_n_weights(np.array([0.0, 5.0, 5.0]), 2) == pytest.approx([0.0, 0.5, 0.5])
    assert best_of_n_weights(np.ones(4), 3) == pytest.approx([0.25] * 4)


def test_n_is_from_1_to_the_number_of_samples() -> None:
    with pytest.raises(ValueError, match="best of n=3 of 2 samples"):
        best_of_n_weights(np.zeros(2), 3)
    assert powers_of_two(64) == [1, 2, 4, 8, 16, 32, 64]
    assert powers_of_two(5) == [1, 2, 4]


@pytest.mark.parametrize("log", [True, False])
def test_gaos_shapes_are_found_again(log: bool) -> None:
    d = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    bent = np.log(np.maximum(d, 1e-9)) if log else d
    found = fit(list(d), list(d * (1.5 - 0.3 * bent)), log=log)
    assert found == pytest.approx({"alpha": 1.5, "beta": 0.3})
    assert fit([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], log=log) is None


def test_curve_marks_where_the_gold_reward_peaks() -> None:
    def point(step: int, kl: float, gold: list[float]) -> Point:
        return Point({"step": step}, kl, np.array([kl, kl]), np.array(gold))

    points = [point(10, 1.0, [0.0, 1.0]), point(20, 4.0, [2.0, 1.0]), point(30, 9.0, [0.0, 0.5])]
    found = curve(points, seed=0, log=True)
    assert [p["gold"] for p in found["points"]] == [0.5, 1.5, 0.25]
    assert [p["proxy"] for p in found["points"]] == [1.0, 4.0, 9.0]
    peak = found["peak"]
    assert (peak["step"], peak["gold"], peak["fall"], peak["is_last"]) == (20, 1.5, 1.25, False)
    assert peak["fall_interval"] == [0.5, 2.0]  # of 2.0 and 0.5, either one drawn twice
    rising = curve(points[:2], seed=0, log=True)
    assert rising["peak"]["is_last"] and rising["peak"]["fall"] == 0.0
    assert rising["fit"] is None


def test_scale_puts_the_reference_at_0_with_deviation_1() -> None:
    scores = np.array([[1.0, 3.0], [5.0, 7.0]])
    scaled = Scale.of(scores)(scores)
    assert scaled.mean() == pytest.approx(0.0) and scaled.std() == pytest.approx(1.0)
    assert Scale.of(np.full((2, 2), 3.0))(np.array([3.0])) == [0.0]
