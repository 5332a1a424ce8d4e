"""How many pods of which size hold the stages of a recipe: a pure function of the recipe.

The bundles that a stage asks Ray for are packed onto equal pods, those with GPUs onto `gpu` pods,
the others onto `cpu` pods, as `session.shortage` packs them onto nodes before a stage starts.
Stages follow each other, so the largest one counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayrlhf.config import Recipe, RecipeError
from rayrlhf.rl.layout import plan
from rayrlhf.session import Bundle, shortage

CPU_POD_CPUS = 4
GIB_PER_CPU = 4
"""Memory of a CPU pod, as in the general-purpose machines of the large clouds."""
CORPUS_PODS = 8
"""To which number of CPU pods the corpus job may grow: Ray Data takes what there is."""


@dataclass(frozen=True)
class Node:
    """A GPU node, less what Kubernetes and its own daemons take of it.

    The defaults fit the nodes of 8 H100 of the large clouds, whose smallest have 96 CPUs and
    1.8 TiB.
    """

    gpus: int = 8
    cpus: int = 88
    memory_gib: int = 1600


@dataclass(frozen=True)
class Group:
    """Equal pods, one Ray node each."""

    name: str
    cpus: int
    gpus: int
    memory_gib: int
    replicas: int
    max_replicas: int
    min_replicas: int = 0
    """What the autoscaler leaves of them when they are idle."""

    @property
    def resources(self) -> dict[str, float]:
        """What one pod has, in Ray's words."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}


def on_gpu(recipe: Recipe) -> bool:
    """Tell whether any stage of the recipe asks for a GPU."""
    trains = recipe.resources.gpus_per_worker > 0
    return trains or any(recipe.resources.role(role).gpus > 0 for role in recipe.roles)


def demands(recipe: Recipe, stages: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Return what each of the stages asks for at once: a bundle per worker.

    `pipeline` is every stage of the recipe. A round has one engine answer, then trains its reward
    model and its policy. The evaluation is one process, which takes one GPU where the recipe has
    any.
    """
    named: dict[str, None] = {}
    for stage in stages:
        named |= dict.fromkeys(recipe.stages if stage == "pipeline" else (stage,))
        if stage == "rounds":
            named |= dict.fromkeys(("reward", "ppo"))
    found = {}
    for stage in named:
        if stage == "ppo":
            bundles = plan(recipe).demand
        elif stage == "rounds":
            engine = recipe.resources.rollout
            bundles = [{"CPU": engine.cpus, "GPU": engine.gpus}]
        elif stage == "evaluate":
            bundles = [{"CPU": 1.0, "GPU": 1.0 if on_gpu(recipe) else 0.0}]
        else:
            bundles = recipe.resources.bundles(stage)
        found[stage] = [
            {name: amount for name, amount in bundle.items() if amount} for bundle in bundles
        ]
    return found


def groups(recipe: Recipe, stages: Sequence[str], node: Node) -> list[Group]:
    """Return the groups of pods that hold every one of the stages, one after the other.

    Raises RecipeError for a bundle that no pod on `node` can hold.
    """
    asked = demands(recipe, stages)
    with_gpu = {s: [b for b in bundles if "GPU" in b] for s, bundles in asked.items()}
    without = {s: [b for b in bundles if "GPU" not in b] for s, bundles in asked.items()}
    found = []
    if any(with_gpu.values()):
        cpus, gpus, memory_gib = _gpu_pod(with_gpu, node)
        replicas = _replicas(recipe, with_gpu, {"CPU": float(cpus), "GPU": float(gpus)})
        found.append(Group("gpu", cpus, gpus, memory_gib, replicas, replicas))
    if any(without.values()):
        largest = max(bundle["CPU"] for bundles in without.values() for bundle in bundles)
        cpus = max(CPU_POD_CPUS, math.ceil(largest))
        replicas = _replicas(recipe, without, {"CPU": float(cpus)})
        most = max(replicas, CORPUS_PODS if "corpus" in asked else 0)
        # One stays, for what a job does between its stages.
        found.append(Group("cpu", cpus, 0, GIB_PER_CPU * cpus, replicas, most, 1))
    return found


def _gpu_pod(asked: dict[str, list[dict[str, float]]], node: Node) -> tuple[int, int, int]:
    """Return CPUs, GPUs and GiB of a GPU pod: a whole node, or the part of one that is enough."""
    bundles = [bundle for each in asked.values() for bundle in each]
    widest = max(bundle["GPU"] for bundle in bundles)
    if widest > node.gpus:
        raise RecipeError(
            f"{widest:g} GPUs are asked for on one node, and a GPU pod has at most {node.gpus}: "
            "lower resources.rollout.gpus, set resources.placement=PACK if it is STRICT_PACK, or "
            "name larger nodes with --gpus-per-node"
        )
    most = max(sum(bundle["GPU"] for bundle in each) for each in asked.values())
    gpus = min(node.gpus, math.ceil(most - 1e-6))
    per_gpu = max(bundle["CPU"] / bundle["GPU"] for bundle in bundles)
    share = max(node.cpus * gpus // node.gpus, math.ceil(per_gpu * gpus))
    hungriest = max(bundle["CPU"] for bundle in bundles)
    if hungriest > node.cpus:
        raise RecipeError(
            f"{hungriest:g} CPUs are asked for beside a GPU, and a GPU pod has at most "
            f"{node.cpus}: lower resources.cpus_per_worker or the cpus of PPO's roles"
        )
    return min(share, node.cpus), gpus, node.memory_gib * gpus // node.gpus


def _replicas(
    recipe: Recipe, asked: dict[str, list[dict[str, float]]], pod: dict[str, float]
) -> int:
    """Return how many pods hold each of the stages."""
    return max(_count(recipe, stage, bundles, pod) for stage, bundles in asked.items())


def _count(recipe: Recipe, stage: str, bundles: Sequence[Bundle], pod: dict[str, float]) -> int:
    if stage == "ppo" and recipe.resources.placement == "STRICT_SPREAD":
        return len(bundles)
    number = max(
        (
            math.ceil(sum(bundle.get(name, 0) for bundle in bundles) / has - 1e-6)
            for name, has in pod.items()
        ),
        default=0,
    )
    # Each bundle fits on a pod by itself, so that this ends.
    while shortage(bundles, [pod] * number) is not None:
        number += 1
    return number
