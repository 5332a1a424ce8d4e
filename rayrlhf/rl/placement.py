"""Where the five roles live: `plan` is pure, `launch` has the only ray.remote() of the package."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf import session
from rayrlhf.config import ROLES, Recipe, RecipeError, Role
from rayrlhf.rl.groups import (
    ActorGroup,
    CriticGroup,
    Handle,
    Pending,
    ReferenceGroup,
    RewardGroup,
    RolloutGroup,
    nothing,
    wait_all,
)
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.workers import (
    ActorWorker,
    CriticWorker,
    ReferenceWorker,
    RewardWorker,
    RolloutWorker,
)

WORKERS: dict[Role, type] = {
    "actor": ActorWorker,
    "critic": CriticWorker,
    "reference": ReferenceWorker,
    "reward": RewardWorker,
    "rollout": RolloutWorker,
}


@dataclass(frozen=True)
class Place:
    """One worker: its role, its rank in the role, and what it takes from its node."""

    role: Role
    rank: int
    world_size: int
    cpus: float
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """The worker's bundle of the placement group."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Layout:
    """All workers of PPO and the strategy that places them; bundle i belongs to places[i]."""

    places: tuple[Place, ...]
    strategy: str

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The bundles of the placement group."""
        return [place.bundle for place in self.places]

    @property
    def demand(self) -> list[dict[str, float]]:
        """What single nodes must hold: every bundle, or their sum where one node holds all."""
        if self.strategy != "STRICT_PACK":
            return self.bundles
        total = {"CPU": sum(p.cpus for p in self.places), "GPU": sum(p.gpus for p in self.places)}
        return [{name: amount for name, amount in total.items() if amount or name == "CPU"}]


@dataclass(frozen=True)
class Roles:
    """The typed fronts of the roles."""

    actor: ActorGroup
    critic: CriticGroup | None
    """None for a learner without a value function."""
    reference: ReferenceGroup
    reward: RewardGroup
    rollout: RolloutGroup


def plan(recipe: Recipe, nodes: Sequence[Mapping[str, float]] | None = None) -> Layout:
    """Return the layout of the PPO roles; with `nodes` (resources of each), check that it fits.

    Raises RecipeError that names the resource that is short.
    """
    resources = recipe.resources
    places = tuple(
        Place(role, rank, own.num_workers, own.cpus, own.gpus)
        for role in recipe.roles
        for own in [resources.role(role)]
        for rank in range(own.num_workers)
    )
    layout = Layout(places, resources.placement)
    if nodes is not None:
        missing = session.shortage(layout.demand, nodes)
        if missing is None and layout.strategy == "STRICT_SPREAD" and len(nodes) < len(places):
            missing = (
                f"resources.placement=STRICT_SPREAD asks for {len(places)} nodes, "
                f"{len(nodes)} registered: add nodes, or set resources.placement=SPREAD"
            )
        if missing is not None:
            raise RecipeError(f"ppo: {missing}")
    return layout


def cluster_nodes() -> list[dict[str, float]]:
    """Return the resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def launch(
    layout: Layout, settings: Mapping[Role, RoleSettings], *, deadline_s: float
) -> Iterator[Roles]:
    """Start every worker of `layout`, all at the same time, and end them with the block.

    Raises TimeoutError when the placement group or a role is not ready after `deadline_s`.
    """
    group = placement_group(layout.bundles, strategy=layout.strategy)
    handles: dict[Role, list[Handle]] = {role: [] for role in ROLES}
    try:
        fix = f"{layout.bundles}; see `ray status` for who holds the resources"
        Pending("placement_group", "ready", [group.ready()], nothing, deadline_s, fix).wait()
        hosts = _hosts(group, layout)
        for index, place in enumerate(layout.places):
            first = next(i for i, other in enumerate(layout.places) if other.role == place.role)
            mine = replace(
                settings[place.role],
                rank=place.rank,
                world_size=place.world_size,
                num_gpus=place.gpus,
                host=hosts[first],
            )
            remote = ray.remote(WORKERS[place.role])
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            handles[place.role].append(
                remote.options(
                    num_cpus=place.cpus,
                    num_gpus=place.gpus,
                    scheduling_strategy=strategy,
                ).remote(mine)
            )
        roles = Roles(
            actor=ActorGroup(handles["actor"], deadline_s=deadline_s),
            critic=(
                CriticGroup(handles["critic"], deadline_s=deadline_s) if handles["critic"] else None
            ),
            reference=ReferenceGroup(handles["reference"], deadline_s=deadline_s),
            reward=RewardGroup(handles["reward"], deadline_s=deadline_s),
            rollout=RolloutGroup(handles["rollout"], deadline_s=deadline_s),
        )
        wait_all(
            roles.rollout.start(),
            roles.actor.start(),
            *([roles.critic.start()] if roles.critic else []),
            roles.reference.start(),
            roles.reward.start(),
        )
        yield roles
    finally:
        for handle in [handle for role in ROLES for handle in handles[role]]:
            ray.kill(handle)
        remove_placement_group(group)


def _hosts(group: object, layout: Layout) -> list[str]:
    """Return the address of the node of each place."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [addresses[nodes[index]] for index in range(len(layout.places))]
