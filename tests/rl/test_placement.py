"""The layout of the roles is a pure function of the recipe."""

from typing import Any

import pytest
import ray

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.rl import waiting
from rayrlhf.rl.layout import arrange, plan
from rayrlhf.rl.placement import launch


def recipe(**resources: Any) -> Recipe:
    return parse(
        {"name": "x", "model": {"path": "m"}, "ppo": {"prompts": "p"}, "resources": resources}
    )


def test_five_roles_one_bundle_each() -> None:
    layout = plan(recipe())
    assert [place.role for place in layout.places] == [
        "actor",
        "critic",
        "reference",
        "reward",
        "rollout",
    ]
    assert layout.bundles == ({"CPU": 0.25},) * 5


def test_ranks_of_a_role_follow_each_other() -> None:
    layout = plan(
        recipe(actor={"num_workers": 2, "gpus": 1}, rollout={"num_workers": 2, "gpus": 2})
    )
    assert [(p.role, p.rank, p.world_size) for p in layout.places] == [
        ("actor", 0, 2),
        ("actor", 1, 2),
        ("critic", 0, 1),
        ("reference", 0, 1),
        ("reward", 0, 1),
        ("rollout", 0, 2),
        ("rollout", 1, 2),
    ]
    assert layout.bundles[0] == {"CPU": 0.25, "GPU": 1}
    assert layout.bundles[-1] == {"CPU": 0.25, "GPU": 2}


def test_strict_pack_asks_one_node_for_everything() -> None:
    assert plan(recipe(placement="STRICT_PACK")).demand == [{"CPU": 1.25}]


@pytest.mark.parametrize(
    ("resources", "nodes", "said"),
    [
        ({}, [{"CPU": 2}], None),
        ({}, [{"CPU": 1}], "1.25 CPU asked for, 1 registered"),
        ({"actor": {"gpus": 1}}, [{"CPU": 8}], "1 GPU asked for, 0 registered"),
        ({"actor": {"cpus": 3}}, [{"CPU": 2}, {"CPU": 2}], "no node has that much CPU"),
        ({"placement": "STRICT_PACK"}, [{"CPU": 1}, {"CPU": 1}], "CPU"),
        ({"placement": "STRICT_SPREAD"}, [{"CPU": 4}], "5 nodes"),
        ({"placement": "STRICT_SPREAD"}, [{"CPU": 1}] * 5, None),
        (
            {"rollout": {"num_workers": 4, "gpus": 2}, "actor": {"num_workers": 8, "gpus": 1}},
            [{"CPU": 8, "GPU": 8}] * 2,
            None,
        ),
    ],
)
def test_a_shortage_names_the_resource(
    resources: dict[str, Any], nodes: list[dict[str, float]], said: str | None
) -> None:
    if said is None:
        plan(recipe(**resources), nodes)
        return
    with pytest.raises(RecipeError, match=said):
        plan(recipe(**resources), nodes)


ONE_GPU = {"gpus": 1}
ALL_ON_GPU = dict.fromkeys(("actor", "critic", "reference", "reward", "rollout"), ONE_GPU)
LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, float]], dict[str, Any]]] = {
    # resources; bundles; per worker: bundle, CPUs, GPUs (bundles of an engine in several: its part)
    "two engines of two GPUs each": (
        {"rollout": {"num_workers": 2, "gpus": 2}, "actor": ONE_GPU},
        [{"CPU": 0.25, "GPU": 1}, *[{"CPU": 0.25}] * 3, *[{"CPU": 0.25, "GPU": 2}] * 2],
        {"actor 0": (0, 0.25, 1), "rollout 0": (4, 0.25, 2), "rollout 1": (5, 0.25, 2)},
    ),
    "critic and reward model on one device": (
        {
            "critic": {"gpus": 0.6, "num_workers": 2},
            "reward": {"gpus": 0.4, "shares": "critic", "cpus": 0.5},
        },
        [{"CPU": 0.25}, {"CPU": 0.75, "GPU": 1}, {"CPU": 0.25, "GPU": 0.6}, *[{"CPU": 0.25}] * 2],
        {"critic 0": (1, 0.25, 0.6), "critic 1": (2, 0.25, 0.6), "reward 0": (1, 0.5, 0.4)},
    ),
    "colocated on one GPU": (
        {"layout": "colocated", **ALL_ON_GPU},
        [{"CPU": 0.25, "GPU": 1}],
        {"actor 0": (0, 0.05, 0.2), "rollout 0": (0, 0.05, 0.2)},
    ),
    "colocated, with reference and reward on CPU": (
        {"layout": "colocated", "actor": ONE_GPU, "critic": ONE_GPU, "rollout": ONE_GPU},
        [{"CPU": 0.25, "GPU": 1}, {"CPU": 0.25}, {"CPU": 0.25}],
        {"actor 0": (0, 0.0833, 0.3333), "reference 0": (1, 0.25, 0), "reward 0": (2, 0.25, 0)},
    ),
    "colocated, two engines over two of four GPUs each": (
        {
            "layout": "colocated",
            "actor": {"gpus": 1, "num_workers": 4, "cpus": 2},
            "critic": {"gpus": 1, "num_workers": 2},
            "rollout": {"gpus": 2, "num_workers": 2},
        },
        [{"CPU": 2, "GPU": 1}] * 4 + [{"CPU": 0.25}] * 2,
        {
            "actor 0": (0, 0.6666, 0.3333),
            "actor 3": (3, 1, 0.5),
            "critic 1": (1, 0.6666, 0.3333),
            "rollout 0": (0, 0.6666, 0, (0, 1), 0.3333),
            "rollout 1": (2, 1, 0, (2, 3), 0.5),
        },
    ),
    "colocated on two cores": (
        {"layout": "colocated", "actor": {"cpus": 2}, "critic": {"cpus": 2, "num_workers": 2}},
        [{"CPU": 2}, {"CPU": 2}],
        {"actor 0": (0, 0.4, 0), "critic 1": (1, 2, 0), "rollout 0": (0, 0.4, 0)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    resources, bundles, places = LAYOUTS[name]
    layout = plan(recipe(**resources))
    assert list(layout.bundles) == bundles
    found = {
        f"{p.role} {p.rank}": (p.bundle, p.cpus, p.gpus, *((p.spread, p.share) if p.spread else ()))
        for p in layout.places
    }
    assert {worker: found[worker] for worker in places} == places
    assert layout.takes_turns == name.startswith("colocated")
    # What the workers take fits into their bundles.
    for index, bundle in enumerate(layout.bundles):
        here = [place for place in layout.places if place.bundle == index]
        over = [place for place in layout.places if index in place.spread]
        assert sum(p.cpus for p in here) <= bundle["CPU"] + 1e-9
        gpus = sum(p.gpus for p in here) + sum(p.share for p in over)
        assert gpus <= bundle.get("GPU", 0) + 1e-9


@pytest.mark.parametrize(
    ("nodes", "engines"),
    [
        ("aabb", ["aa", "bb"]),
        ("abba", ["aa", "bb"]),  # each of them torn apart
        ("abbbbcca", ["aa", "cc", "bb", "bb"]),
        ("abcd", []),  # no node has two
    ],
)
def test_equal_bundles_change_places_until_engines_are_whole(
    nodes: str, engines: list[str]
) -> None:
    num = len(nodes) // 2
    layout = plan(
        recipe(
            layout="colocated",
            actor={"num_workers": len(nodes), **ONE_GPU},
            critic={"num_workers": len(nodes), **ONE_GPU},
            reference=ONE_GPU,
            reward=ONE_GPU,
            rollout={"num_workers": num, "gpus": 2},
        ),
    )
    part = arrange(layout, nodes)
    assert sorted(part) == list(range(len(nodes)))
    assert [layout.bundles[i] for i in part] == list(layout.bundles)
    spreads = [place.spread for place in layout.places if place.spread]
    found = ["".join(nodes[part[i]] for i in spread) for spread in spreads]
    whole = [engine for engine in found if len(set(engine)) == 1]
    assert whole[: len(engines)] == engines


def test_bundles_of_other_sizes_do_not_change_places() -> None:
    layout = plan(
        recipe(
            layout="colocated",
            actor={"num_workers": 4, "gpus": 1, "cpus": 2},
            critic=ONE_GPU,
            reference=ONE_GPU,
            reward=ONE_GPU,
            rollout={"gpus": 2, "cpus": 4},
        )
    )
    assert [bundle["CPU"] for bundle in layout.bundles] == [4, 4, 2, 2]
    assert arrange(layout, "abab") == arrange(layout, "aabb") == [0, 1, 2, 3]


def test_who_shares_with_a_critic_that_is_not_there_is_on_its_own() -> None:
    resources = {"critic": {"gpus": 0.5}, "reward": {"gpus": 0.5, "shares": "critic"}}
    tree = {"prompts": "p", "advantage_estimator": "reinforce_pp"}
    free = parse({"name": "x", "model": {"path": "m"}, "ppo": tree, "resources": resources})
    assert {"CPU": 0.25, "GPU": 0.5} in plan(free).bundles


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"reward": {"shares": "reward"}}, "name a role that has"),
        ({"reward": {"shares": "critic"}, "critic": {"shares": "actor"}}, "name a role that has"),
        (
            {"reward": {"shares": "critic", "gpus": 1}, "critic": {"gpus": 1}},
            r"critic, reward ask for 2 GPU together",
        ),
        ({"reward": {"shares": "critic"}, "critic": {"gpus": 1}}, "1 GPU together"),
        ({"layout": "colocated", "actor": {"gpus": 0.5}}, r"set resources\.actor\.gpus=1"),
        ({"layout": "colocated", "reward": {"shares": "critic"}}, "no effect"),
    ],
)
def test_impossible_neighbours_are_refused(resources: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(**resources)


def test_who_takes_turns_cannot_run_ahead() -> None:
    tree = {"prompts": "p", "max_staleness": 1}
    with pytest.raises(RecipeError, match=r"take turns: set resources\.layout=\s?disaggregated"):
        parse(
            {
                "name": "x",
                "model": {"path": "m"},
                "ppo": tree,
                "resources": {"layout": "colocated"},
            }
        )


@pytest.mark.ray
def test_a_placement_group_that_never_becomes_ready_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "LINE_EVERY_S", 0.5)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with (
            pytest.raises(TimeoutError, match=r"placement_group\.ready .*deadline_s=1\.2 .*CPU"),
            launch(plan(recipe(actor={"cpus": 8})), {}, deadline_s=1.2),
        ):
            pass
    finally:
        ray.shutdown()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo:")]
    assert lines[0] == "ppo: waiting for placement_group.ready, 1 s left"
    assert len(lines) == 2
