"""The layout of the roles is a pure function of the recipe."""

from typing import Any

import pytest
import ray

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.rl import groups
from rayrlhf.rl.placement import launch, plan


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
    assert layout.bundles == [{"CPU": 0.25}] * 5


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


@pytest.mark.ray
def test_a_placement_group_that_never_becomes_ready_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(groups, "LINE_EVERY_S", 0.5)
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
