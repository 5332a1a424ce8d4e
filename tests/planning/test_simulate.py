"""The terms of a simulated run, by hand, and the run against its first-order loss."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.config import load
from rayrlhf.planning import lengths, simulate
from rayrlhf.planning.devices import parse_cluster
from rayrlhf.planning.estimate import Estimate, estimate
from rayrlhf.planning.simulate import DAY_S, Terms, terms_of

ROOT = Path(__file__).parents[2]
TERMS = Terms(
    devices=1024,
    rollout=40.0,
    learner=50.0,
    sync=10.0,
    overlaps=False,
    staleness=0,
    tokens=1e6,
    between_failures=20_000.0,
    learner_part=0.5,
    checkpoint=60.0,
)


@pytest.fixture(scope="module")
def planned() -> Estimate:
    path = ROOT / "configs" / "llama-3.1-70b.yaml"
    return estimate(load(path), parse_cluster("8x8xH200"))


def test_intervals_of_young_and_daly() -> None:
    assert simulate.young(50, 10_000) == 1000
    # Daly: 1000 (1 + sqrt(0.0025) / 3 + 0.0025 / 9) - 50
    assert simulate.daly(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert simulate.daly(300, 100) == 100
    assert TERMS.young == simulate.young(60, 40_000)


def test_daly_s_interval_loses_the_least() -> None:
    best = simulate.lost_part(TERMS, TERMS.daly)
    for factor in (0.25, 0.5, 2, 4):
        assert simulate.lost_part(TERMS, factor * TERMS.daly) > best


@pytest.mark.parametrize("factor", [0.5, 1, 3])
def test_a_simulated_run_loses_what_the_first_order_says(factor: float) -> None:
    interval = factor * TERMS.daly
    lost = 1 - simulate.goodput(TERMS, interval, days=3000)
    assert lost == pytest.approx(simulate.lost_part(TERMS, interval), rel=0.1)


def test_a_run_without_failures_loses_its_checkpoints() -> None:
    safe = replace(TERMS, between_failures=1e15)
    assert simulate.goodput(safe, 940.0, days=30) == pytest.approx(0.94, abs=1e-3)


def test_draws_are_seeded() -> None:
    assert simulate.goodput(TERMS, 1000) == simulate.goodput(TERMS, 1000)
    assert simulate.goodput(TERMS, 1000, seed=1) != simulate.goodput(TERMS, 1000)


def test_a_step_of_terms() -> None:
    assert TERMS.step == 100
    assert replace(TERMS, overlaps=True).step == 60


def test_failures_are_those_of_llama_3(planned: Estimate) -> None:
    """419 in 54 days on 16,384 GPUs: one in about three hours."""
    terms = terms_of(planned, 16_384)
    assert DAY_S / terms.between_failures == pytest.approx(419 / 54)


def test_terms_grow_with_the_size(planned: Estimate) -> None:
    small, large = terms_of(planned, 64), terms_of(planned, 4096)
    assert planned.step is not None
    assert small.tokens == pytest.approx(planned.step.tokens)
    assert large.tokens == pytest.approx(64 * small.tokens)
    weights = 2 * planned.roles["actor"].shape.num_params
    network = planned.cluster.device.network
    assert small.sync == pytest.approx(planned.step.phases["sync"] + 3 * weights / network)
    assert large.sync == pytest.approx(planned.step.phases["sync"] + 9 * weights / network)
    assert large.rollout >= small.rollout
    assert large.learner > small.learner
    assert small.learner_part == large.learner_part == 36 / 64
    assert small.staleness == 1


def test_the_longest_response_is_that_of_more(planned: Estimate) -> None:
    assert simulate.longest_response(100, 1000, 10) < simulate.longest_response(100, 1000, 1000)
    assert simulate.longest_response(100, 1000, 1e9) == 1000
    assert simulate.longest_response(999.9, 1000, 4) == 1000


def test_quantiles_have_the_mean() -> None:
    for mean in (10, 100, 500, 900):
        found = lengths.quantiles(2000, mean, 1000)
        assert sum(found) / len(found) == pytest.approx(mean, rel=0.02)
        assert max(found) <= 1000 and min(found) >= 1
    assert lengths.quantiles(3, 1000, 1000) == [1000] * 3
    scale = lengths.exponential_scale(100, 1000)
    assert scale * -math.expm1(-1000 / scale) == pytest.approx(100)


def test_a_plot_and_a_table(planned: Estimate, tmp_path: Path) -> None:
    place = tmp_path / "new" / "run.png"
    lines = simulate.simulate_sizes(planned, place, (1, 64, 4096))
    assert place.read_bytes().startswith(b"\x89PNG")
    assert lines[-1] == f"plot: {place}"
    assert "ppo.save_every=25 is " in lines[-2]
    assert len(lines[1].splitlines()) == 5
