"""A node is lost in the middle of a step: the run goes on on another one, to the same numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from rayrlhf.config import parse
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import groups, placement, ppo
from rayrlhf.rl.supervision import Handle
from tests.rl.inline import SmallRollout, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROLES = ("actor", "critic", "reference", "reward", "rollout")
LOST_IN_STEP = 3
NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with room for two workers, and a node with room for the others."""
    made = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 2, "_system_config": SOON}
    )
    made.add_node(num_cpus=3, **NODE)
    made.wait_for_nodes(timeout=60)
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()


def recipe(folder: Path, model: Path) -> dict[str, Any]:
    ScalarHeadModel.from_causal_lm(model).save_pretrained(folder / "reward" / "final")
    (folder / "prompts.jsonl").write_text('{"prompt": "The movie"}\n' * 8, encoding="utf-8")
    return {
        "name": "x",
        "run_dir": str(folder),
        "model": {"path": str(model), "max_length": 64},
        "resources": {"wait_s": 60, **{role: {"cpus": 1} for role in ROLES}},
        "ppo": {
            "prompts": str(folder / "prompts.jsonl"),
            "steps": 5,
            "batch_size": 8,
            "max_response_tokens": 4,
            "save_every": 2,
            "deadline_s": 200,
            "actor": {"learning_rate": 1e-3},
            "critic": {"learning_rate": 1e-3},
        },
    }


def test_a_lost_node(
    cluster: Cluster, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(placement.WORKERS, "rollout", SmallRollout)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ppo.train_ppo(parse(recipe(whole, tiny_model)))

    there: list[str] = []
    spawn, generate = placement.Bundles.spawn, groups.RolloutGroup.generate
    bundles: list[placement.Bundles] = []

    def spawn_and_tell(self: placement.Bundles, *args: Any) -> Handle:
        bundles[:] = [self]
        return spawn(self, *args)

    def lose(self: groups.RolloutGroup, prompts: list[list[int]], step: int) -> Any:
        pending = generate(self, prompts, step)
        if step == LOST_IN_STEP and not there:
            lost = next(iter(cluster.worker_nodes))
            nodes_of = placement_group_table(bundles[0].group)["bundles_to_node_id"]
            there.extend(
                place.role
                for place in map(bundles[0]._placed, bundles[0].layout.places)
                if nodes_of[place.bundle] == lost.node_id
            )
            cluster.remove_node(lost, allow_graceful=False)
            cluster.add_node(num_cpus=3, **NODE)
        return pending

    monkeypatch.setattr(placement.Bundles, "spawn", spawn_and_tell)
    monkeypatch.setattr(groups.RolloutGroup, "generate", lose)
    ppo.train_ppo(parse(recipe(cut, tiny_model)))

    rows, undisturbed = (read_jsonl(folder / "ppo" / "metrics.jsonl") for folder in (cut, whole))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert timeless(rows) == timeless(undisturbed)
    assert len(there) == 3
    died = {role for role in ROLES if rows[-1][f"restarts/{role}"]}
    assert died & set(there)
