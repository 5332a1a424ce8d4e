"""Roles that Ray puts on parts of one GPU are weighed together."""

from pathlib import Path

import pytest

from rayrlhf.config import Recipe, load
from rayrlhf.planning.devices import parse_cluster
from rayrlhf.planning.estimate import estimate
from rayrlhf.planning.fit import _devices
from rayrlhf.rl import layout as layouts

RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.1-8b.yaml"
ROLES = ("actor", "critic", "reference", "reward", "rollout")


def recipe(*changes: str) -> Recipe:
    """Return the recipe on GPUs of their own, one worker a role."""
    apart = ["resources.layout=disaggregated", "resources.placement=PACK", "sft=null"]
    one = [f"resources.{role}.num_workers=1" for role in ROLES]
    return load(
        RECIPE,
        [*apart, *one, "reward=null", "ppo.rewards=[{model: meta-llama/Llama-3.1-8B}]", *changes],
    )


@pytest.mark.parametrize(
    ("parts", "together"),
    [
        ((0.5, 0.5), [{"reference": 1, "reward": 1}]),
        ((0.5, 0.6), [{"reference": 1}, {"reward": 1}]),
        ((1, 0.5), [{"reference": 1}, {"reward": 1}]),
    ],
)
def test_parts_of_a_gpu_fill_one_before_the_next(
    parts: tuple[float, float], together: list[dict[str, int]]
) -> None:
    changes = [f"resources.reference.gpus={parts[0]}", f"resources.reward.gpus={parts[1]}"]
    layout = layouts.plan(recipe(*changes))
    found = _devices(parse_cluster("1x8xH100"), layout)
    alone: list[dict[str, int]] = [{"actor": 1}, {"critic": 1}, {"rollout": 1}]
    assert sorted(map(str, found)) == sorted(map(str, [*alone, *together]))


def test_two_that_fit_alone_but_not_on_one_gpu_are_short() -> None:
    halves = [f"resources.{role}.gpus=0.5" for role in ("reference", "reward")]

    def short(cluster: str, *changes: str) -> list[str]:
        found = estimate(recipe(*changes), parse_cluster(cluster)).shortfalls
        return [f"{each.who} {each.where}" for each in found if "reference" in str(each)]

    assert not short("1x8xH100", *halves)
    assert not short("1x8xL4")
    assert len(short("1x8xL4", *halves)) == 1
