"""Times against published ones, and the terms by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.config import load
from rayrlhf.planning import memory, shapes, speed
from rayrlhf.planning.advice import that_helps
from rayrlhf.planning.devices import DEVICES, parse_cluster, this_machine
from rayrlhf.planning.estimate import estimate
from rayrlhf.planning.needs import Need
from rayrlhf.planning.speed import Rates, StepTime
from tests.planning.published import FIGURES, Figure, predicted

ROOT = Path(__file__).parents[2]
EIGHT = shapes.KNOWN["llama-3.1-8b"]
H100 = DEVICES["H100"]
RATES = Rates(
    train=1e12,
    forward=1e12,
    bandwidth=1e12,
    token_s=0.01,
    response_s=0.001,
    layer_s=0.0,
    sync_s=0.0,
    sync_bandwidth=1e9,
    call_s=0.0,
    source="by hand",
)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_published_step_times(figure: Figure) -> None:
    assert figure.seconds / 1.5 < predicted(figure).seconds < figure.seconds * 1.5


def engine(cache: float, width: int = 1) -> Need:
    held = memory.Memory(cache=cache)
    return Need("rollout", EIGHT, 1, width, H100, held, 0.0)


def test_forward_flops_are_two_per_entry_and_token() -> None:
    matrices = EIGHT.num_layers * EIGHT.layer_matrices
    assert speed.forward_flops(EIGHT, 10, 0, 0) == 20 * matrices
    with_outputs = speed.forward_flops(EIGHT, 10, 0, 3)
    assert with_outputs - 20 * matrices == 6 * EIGHT.vocab_size * EIGHT.hidden_size


def test_decoding_is_bound_by_memory_for_one_and_by_products_for_many() -> None:
    rates = replace(RATES, forward=1e15, response_s=0.0, token_s=0.0)
    weights = 2 * (EIGHT.num_params - EIGHT.embedding_params)
    one = speed.decode_s(engine(1e12), [10], 0.0, rates, 2)
    kv = EIGHT.kv_bytes_per_token(2) * 10 / 2 * 10
    assert one == pytest.approx((10 * weights + kv) / 1e12)
    slow = replace(rates, forward=1e12)
    flops = speed.forward_flops(EIGHT, 1, 0, 1)
    many = speed.decode_s(engine(1e12), [10] * 64, 0.0, slow, 2)
    assert many == pytest.approx(64 * 10 * flops / 1e12)


def test_responses_that_find_no_room_wait() -> None:
    """Room for two at a time: four of 10 tokens take 20 steps, with room for all of them 10."""
    rates = replace(RATES, bandwidth=1e18, forward=1e18, response_s=0.0)
    each = EIGHT.kv_bytes_per_token(2) * 10
    assert speed.decode_s(engine(2 * each), [10] * 4, 0.0, rates, 2) == pytest.approx(0.2, rel=1e-4)
    assert speed.decode_s(engine(4 * each), [10] * 4, 0.0, rates, 2) == pytest.approx(0.1, rel=1e-4)
    # As one ends, the next takes its place.
    assert speed.decode_s(engine(2 * each), [5, 5, 10], 0.0, rates, 2) == pytest.approx(
        0.1, rel=1e-4
    )


def test_a_step_that_overlaps_takes_the_longer_of_the_two() -> None:
    phases = {"rollout": 5.0, "evaluate": 1.0, "update": 2.0, "sync": 0.5}
    assert StepTime(phases, {}, 85.0).seconds == 8.5
    apart = StepTime(phases, {"rollout rollout": 5.0}, 85.0, overlaps=True)
    assert apart.seconds == 5.5
    assert apart.bottleneck == "rollout (rollout)"
    cluster = parse_cluster("1x2xH100").priced(3.6)
    assert StepTime(phases, {}, 85.0).cost(cluster) == pytest.approx(7.2 / 3600 * 8.5 / 85 * 1e6)


def test_roles_add_up_where_they_share_a_device() -> None:
    path = ROOT / "configs" / "llama-3.1-8b.yaml"
    shared = estimate(load(path), parse_cluster("1x8xH100")).step
    apart = estimate(load(path, ["resources.layout=disaggregated"]), parse_cluster("5x8xH100")).step
    assert shared is not None and apart is not None
    each = [s for key, s in shared.roles.items() if key.startswith("evaluate")]
    assert shared.phases["evaluate"] == pytest.approx(sum(each) + 0.05)
    assert apart.phases["evaluate"] == pytest.approx(max(each) + 0.05)


def test_twice_the_ranks_take_half_the_time() -> None:
    path = ROOT / "configs" / "llama-3.1-8b.yaml"
    whole = estimate(load(path), parse_cluster("1x8xH100")).stage_steps["sft"]
    half = estimate(load(path, ["resources.num_workers=4"]), parse_cluster("1x8xH100"))
    assert half.stage_steps["sft"].seconds == pytest.approx(2 * whole.seconds, rel=0.2)


def test_the_first_change_that_helps_is_one_that_was_tried() -> None:
    """An engine with tensor parallelism that it does not need, and idle devices."""
    path = ROOT / "configs" / "qwen3-32b.yaml"
    now = estimate(load(path, ["resources.rollout.num_workers=1"]), parse_cluster("4x8xH100"))
    found = that_helps(now)
    assert found is not None and now.step is not None and found[1].step is not None
    change, after = found
    assert any(key.startswith("resources.rollout") for key, _ in change)
    assert after.step.seconds < 0.97 * now.step.seconds
    assert not after.shortfalls


def test_measured_rates_take_the_place_of_the_table_s() -> None:
    recipe = load(ROOT / "configs" / "quickstart.yaml")
    table = estimate(recipe, this_machine()).step
    slow = speed.rates_of(this_machine().device, "float32")
    slow = replace(slow, train=slow.train / 10, forward=slow.forward / 10)
    measured = estimate(recipe, this_machine(), slow).step
    assert table is not None and measured is not None
    assert measured.phases["update"] > 2 * table.phases["update"]
