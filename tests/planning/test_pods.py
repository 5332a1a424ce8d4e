"""Sizes of pods, worked out by hand."""

import pytest

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.planning.pods import Group, Node, demands, groups
from rayrlhf.rl.layout import plan
from rayrlhf.session import shortage

SMALL = Node(gpus=4, cpus=40, memory_gib=400)
ROLE = {"gpus": 1, "cpus": 1}


def recipe(**resources: object) -> Recipe:
    """Return a recipe of SFT, a reward model and PPO."""
    return parse(
        {
            "name": "toy",
            "model": {"path": "m"},
            "sft": {"train": "demos.jsonl"},
            "reward": {"train": "ranked.jsonl"},
            "ppo": {"prompts": "prompts.jsonl", "batch_size": 64, "num_minibatches": 1},
            "resources": resources,
        }
    )


def five(**rollout: object) -> dict[str, object]:
    """Return a GPU for each worker of PPO."""
    return {
        "actor": {**ROLE, "num_workers": 4},
        "critic": {**ROLE, "num_workers": 2},
        "reference": ROLE,
        "reward": ROLE,
        "rollout": ROLE | rollout,
    }


@pytest.mark.parametrize(
    ("resources", "stages", "expected"),
    [
        # 2 workers of 1 CPU, then 5 roles of a quarter: the smallest pod holds either.
        ({"num_workers": 2}, ["pipeline"], [Group("cpu", 4, 0, 16, 1, 1, 1)]),
        ({"num_workers": 9}, ["sft"], [Group("cpu", 4, 0, 16, 3, 3, 1)]),
        ({"num_workers": 2, "cpus_per_worker": 6}, ["sft"], [Group("cpu", 6, 0, 24, 2, 2, 1)]),
        # 3 GPUs are part of a node, with their part of its CPUs and its memory.
        ({"num_workers": 3, "gpus_per_worker": 1}, ["sft"], [Group("gpu", 30, 3, 300, 1, 1)]),
        ({"num_workers": 10, "gpus_per_worker": 1}, ["sft"], [Group("gpu", 40, 4, 400, 3, 3)]),
        (
            {"num_workers": 1, "gpus_per_worker": 1, "cpus_per_worker": 16},
            ["sft"],
            [Group("gpu", 16, 1, 100, 1, 1)],
        ),
        # 4 + 2 + 1 + 1 + 2 engines of 2 GPUs are 12 GPUs: three whole nodes.
        (five(num_workers=2, gpus=2), ["ppo"], [Group("gpu", 40, 4, 400, 3, 3)]),
        # An engine of 3 GPUs leaves one beside it: 2 x (3 + 1), then 7 more of one.
        (five(num_workers=2, gpus=3), ["ppo"], [Group("gpu", 40, 4, 400, 4, 4)]),
        (
            five(num_workers=2, gpus=2) | {"placement": "SPREAD"},
            ["ppo"],
            [Group("gpu", 40, 4, 400, 3, 3)],
        ),
        # Every worker on a node of its own.
        (
            dict.fromkeys(("actor", "critic", "reference", "reward", "rollout"), ROLE)
            | {"placement": "STRICT_SPREAD"},
            ["ppo"],
            [Group("gpu", 40, 4, 400, 5, 5)],
        ),
        # The learner on a GPU, what scores beside it without.
        (
            {"actor": ROLE, "critic": ROLE, "rollout": ROLE},
            ["ppo"],
            [Group("gpu", 30, 3, 300, 1, 1), Group("cpu", 4, 0, 16, 1, 1, 1)],
        ),
    ],
)
def test_groups(resources: dict[str, object], stages: list[str], expected: list[Group]) -> None:
    made = recipe(**resources)
    found = groups(made, stages, SMALL)
    assert found == expected
    pods = [group.resources for group in found for _ in range(group.replicas)]
    for bundles in demands(made, stages).values():
        assert shortage(bundles, pods) is None
    if stages == ["ppo"]:
        plan(made, pods)


def test_no_pod_more_than_is_needed() -> None:
    made = recipe(**five(num_workers=2, gpus=3))
    (group,) = groups(made, ["ppo"], SMALL)
    with pytest.raises(RecipeError, match="GPU"):
        plan(made, [group.resources] * (group.replicas - 1))


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        (five(gpus=8), "8 GPUs are asked for on one node, and a GPU pod has at most 4"),
        (five() | {"placement": "STRICT_PACK"}, "set resources.placement=PACK"),
        (
            {"gpus_per_worker": 1, "cpus_per_worker": 41},
            "41 CPUs are asked for beside a GPU, and a GPU pod has at most 40",
        ),
    ],
)
def test_what_no_node_holds_is_named(resources: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        groups(recipe(**resources), ["pipeline"], SMALL)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_rounds_ask_for_what_they_train() -> None:
    made = recipe(num_workers=3).model_copy(update={"rounds": object()})
    asked = demands(made, ["rounds"])
    assert set(asked) == {"rounds", "reward", "ppo"}
    assert asked["reward"] == [{"CPU": 1.0}] * 3
