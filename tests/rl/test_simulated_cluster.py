"""Every recipe on a cluster of 8 nodes of 8 GPUs, whose resources Ray only counts.

What is checked stands in Ray's own tables: a placement group without workers takes what its layout
says on real nodes, and costs no process.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import state as ray_state
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from rayrlhf import session
from rayrlhf.config import Recipe, RecipeError, load, parse
from rayrlhf.rl import placement
from rayrlhf.rl.layout import Layout, arrange, plan

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
RECIPES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))
NODE = {"CPU": 128.0, "GPU": 8.0}
NUM_NODES = 8
ONE_GPU = {"gpus": 1, "cpus": 2}
GPU_SIZED: dict[str, dict[str, Any]] = {
    "32B, every role on devices of its own": {
        "actor": {"num_workers": 24, **ONE_GPU},
        "critic": {"num_workers": 16, **ONE_GPU},
        "reference": {"num_workers": 8, "gpus": 0.5},
        "reward": {"num_workers": 8, "gpus": 0.5, "shares": "reference"},
        "rollout": {"num_workers": 2, "gpus": 8, "cpus": 8},
    },
    "70B, all roles in turns": {
        "layout": "colocated",
        "actor": {"num_workers": 64, **ONE_GPU},
        "critic": {"num_workers": 64, **ONE_GPU},
        "reference": {"num_workers": 64, **ONE_GPU},
        "reward": {"num_workers": 64, **ONE_GPU},
        "rollout": {"num_workers": 8, "gpus": 8, "cpus": 4},
    },
    "8B, a role on each node": {
        "placement": "STRICT_SPREAD",
        **dict.fromkeys(("actor", "critic", "reference", "reward"), ONE_GPU),
        "rollout": {"num_workers": 4, "gpus": 8, "cpus": 8},
    },
    "8B, one node": {
        "placement": "STRICT_PACK",
        "actor": {"num_workers": 4, **ONE_GPU},
        "critic": {"num_workers": 2, **ONE_GPU},
        "reference": {"gpus": 0.5},
        "reward": {"gpus": 0.5, "shares": "reference"},
        "rollout": {"gpus": 1},
    },
}


def gpu_sized(name: str) -> Recipe:
    """Return a recipe of PPO whose resources are those of a cluster."""
    ppo = {"prompts": "p", "batch_size": 384, "num_minibatches": 1}
    return parse({"name": "x", "model": {"path": "m"}, "ppo": ppo, "resources": GPU_SIZED[name]})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster whose nodes are a raylet each; no worker starts before it is asked for."""
    made = Cluster(
        initialize_head=True,
        head_node_args={**node_of(0), "_system_config": {"prestart_worker_first_driver": False}},
    )
    nodes = [made.add_node(wait=False, **node_of(i)) for i in range(1, NUM_NODES)]
    assert len(nodes) == NUM_NODES - 1
    made.wait_for_nodes(timeout=60)
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    yield made
    ray.shutdown()
    made.shutdown()


def node_of(index: int) -> dict[str, Any]:
    return {
        "num_cpus": int(NODE["CPU"]),
        "num_gpus": int(NODE["GPU"]),
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "node_name": f"node-{index}",
    }


@contextmanager
def placed(bundles: list[dict[str, float]], strategy: str = "PACK") -> Iterator[list[str]]:
    """Yield the node of each bundle, once Ray has placed them all as they are."""
    group = placement_group(bundles, strategy=strategy)
    try:
        assert placement_group_is_ready(group), f"{bundles} after 15 s"
        table = placement_group_table(group)
        nonzero = [{name: n for name, n in bundle.items() if n} for bundle in bundles]
        assert [table["bundles"][i] for i in range(len(bundles))] == nonzero
        yield [table["bundles_to_node_id"][i] for i in range(len(bundles))]
    finally:
        remove_placement_group(group)
        until(lambda: not any(in_use().values()))


def placement_group_is_ready(group: Any) -> bool:
    return until(lambda: placement_group_table(group)["state"] == "CREATED")


def until(condition: Any, timeout_s: float = 15) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def in_use() -> dict[str, dict[str, float]]:
    """Return what Ray has given away on each node: CPU, GPU."""
    free = ray_state.available_resources_per_node()
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return {
        node: taken
        for node, total in alive.items()
        if node in free
        and any((taken := {n: total[n] - free[node].get(n, 0.0) for n in NODE}).values())
    }


def expected_use(bundles: list[dict[str, float]], nodes: list[str]) -> dict[str, dict[str, float]]:
    """Return what these bundles take of each node."""
    use: dict[str, Counter[str]] = {}
    for bundle, node in zip(bundles, nodes, strict=True):
        use.setdefault(node, Counter()).update({name: bundle.get(name, 0.0) for name in NODE})
    return {node: dict(taken) for node, taken in use.items()}


def same_use(bundles: list[dict[str, float]], nodes: list[str]) -> bool:
    found, expected = in_use(), expected_use(bundles, nodes)
    return found.keys() == expected.keys() and all(
        found[node] == pytest.approx(expected[node]) for node in found
    )


def check(layout: Layout) -> None:
    """Place a layout, and hold every bundle and place of it against what the nodes gave away."""
    bundles = list(layout.bundles)
    with placed(bundles, layout.strategy) as nodes:
        assert until(lambda: same_use(bundles, nodes)), (in_use(), expected_use(bundles, nodes))
        if layout.strategy == "STRICT_PACK":
            assert len(set(nodes)) == 1
        if layout.strategy == "STRICT_SPREAD":
            assert len(set(nodes)) == len(nodes)
        part = arrange(layout, nodes)
        assert [bundles[i] for i in part] == bundles
        for place in layout.places:
            # Tensor parallelism across nodes is an order of magnitude slower than within one.
            on = {nodes[part[index]] for index in place.spread or (place.bundle,)}
            assert len(on) == 1, place


@pytest.mark.parametrize("path", RECIPES)
def test_every_recipe_is_placed_as_its_layout_says(cluster: Cluster, path: str) -> None:
    recipe = load(ROOT / path)
    for stage in recipe.stages:
        if stage == "ppo":
            check(plan(recipe, placement.cluster_nodes()))
        elif stage != "rounds":  # what reward and ppo ask for
            bundles = recipe.resources.bundles(stage)
            session.require(bundles, stage=stage)
            with placed(bundles) as nodes:
                assert until(lambda b=bundles, n=nodes: same_use(b, n))  # type: ignore[misc]


@pytest.mark.parametrize("name", GPU_SIZED)
def test_layouts_of_gpus_are_placed(cluster: Cluster, name: str) -> None:
    recipe = gpu_sized(name)
    layout = plan(recipe, placement.cluster_nodes())
    session.require(layout.demand, stage="ppo")
    check(layout)


def test_workers_are_where_their_places_are(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stubs, the size of a process each, in the bundles of a recipe with every kind of place."""

    class Stub:
        def __init__(self, settings: Any) -> None:
            self.settings = settings

        def where(self) -> tuple[str, int, dict[str, float], str]:
            context = ray.get_runtime_context()
            gpus = len(context.get_accelerator_ids()["GPU"])
            return (
                context.get_node_id(),
                gpus,
                context.get_assigned_resources(),
                self.settings.host,
            )

    @dataclass(frozen=True)
    class Settings:
        ppo: Any
        rank: int = 0
        world_size: int = 1
        num_gpus: float = 0
        spread: tuple[int, ...] = ()
        gpu_share: float = 0
        takes_turns: bool = False
        host: str = ""

    @dataclass(frozen=True)
    class NoInterrupt:
        interrupt: bool = False

    monkeypatch.setattr(placement, "WORKERS", dict.fromkeys(placement.WORKERS, Stub))
    layout = plan(
        parse(
            {
                "name": "x",
                "model": {"path": "m"},
                "ppo": {"prompts": "p", "advantage_estimator": "grpo", "samples_per_prompt": 4},
                "resources": {
                    "placement": "SPREAD",
                    "actor": ONE_GPU,
                    "reference": {"gpus": 0.5},
                    "reward": {"gpus": 0.5, "shares": "reference"},
                    "rollout": {"gpus": 2, "cpus": 4},
                },
            }
        )
    )
    bundles = placement.Bundles(layout, wait_s=0)
    try:
        bundles.ready(30)
        settings: Any = Settings(NoInterrupt())
        workers = [bundles.spawn(place.role, place.rank, settings) for place in layout.places]
        found = ray.get([worker.where.remote() for worker in workers], timeout=60)
        table = placement_group_table(bundles.group)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        for place, (node, num_gpus, assigned, host) in zip(layout.places, found, strict=True):
            assert node == table[place.bundle], place
            assert num_gpus == max(1, int(place.gpus)), place
            assert assigned == {"CPU": place.cpus, "GPU": place.gpus}, place
            assert host == addresses[node]
        reference, reward = (
            next(found[i][0] for i, p in enumerate(layout.places) if p.role == role)
            for role in ("reference", "reward")
        )
        assert reference == reward
        assert len({node for node, *_ in found}) == 3
    finally:
        bundles.close()
        until(lambda: not in_use())


def test_a_missing_node_is_named_and_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Last in this file: it takes a node away, and brings another."""
    recipe = gpu_sized("70B, all roles in turns")
    demand = plan(recipe).demand
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    assert until(lambda: len(placement.cluster_nodes()) == NUM_NODES - 1)

    said = "64 GPU asked for, 56 registered on 7 node\\(s\\) \\(.*128 CPU, 8 GPU.*add nodes with "
    began = time.monotonic()
    with pytest.raises(RecipeError, match=f"^ppo: {said}"):
        session.require(demand, stage="ppo")
    with pytest.raises(RecipeError, match=f"^ppo: {said}"):
        plan(recipe, placement.cluster_nodes())
    with pytest.raises(RecipeError, match="^pretrain: 64 GPU asked for, 56 registered on 7"):
        llama = load(ROOT / "configs/pretrain-llama-7b.yaml")
        session.require(llama.resources.bundles("pretrain"), stage="pretrain")
    assert time.monotonic() - began < 5

    monkeypatch.setattr(session, "LINE_EVERY_S", 1.0)
    began = time.monotonic()
    with pytest.raises(RecipeError, match=f"^ppo: {said}"):
        session.require(demand, wait_s=3, stage="ppo")
    assert 3 <= time.monotonic() - began < 6
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo:")]
    assert lines[0].startswith("ppo: waiting for the cluster, 3 s left: 64 GPU asked for, 56")
    assert len(lines) == 3

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(session.require, demand, wait_s=60, stage="ppo")
        assert not waiting.done()
        cluster.add_node(**node_of(NUM_NODES))
        waiting.result(timeout=60)
    check(plan(recipe, placement.cluster_nodes()))
