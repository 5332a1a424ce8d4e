"""From a recipe to workers: `plan` says where each goes (layout.py), and `launch` starts them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrlhf import console, session
from rayrlhf.config import Role
from rayrlhf.config.rewards import slowest_s
from rayrlhf.rl import waiting
from rayrlhf.rl.groups import (
    WEIGHTS,
    ActorGroup,
    CriticGroup,
    Group,
    ReferenceGroup,
    RewardGroup,
    RolloutGroup,
    TrainedGroup,
)
from rayrlhf.rl.layout import Layout, Place, arrange, plan
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.supervision import Handle, LearnerLost, Seat, Supervisor
from rayrlhf.rl.turns import Turns
from rayrlhf.rl.waiting import Pending, nothing, wait_all
from rayrlhf.rl.weight_sync import Broadcast
from rayrlhf.rl.workers import (
    ActorWorker,
    CriticWorker,
    ReferenceWorker,
    RewardWorker,
    RolloutWorker,
)

__all__ = ["Bundles", "Layout", "Roles", "cluster_nodes", "launch", "plan"]

AnyGroup = TypeVar("AnyGroup", bound=Group)
WORKERS: dict[Role, type] = {
    "actor": ActorWorker,
    "critic": CriticWorker,
    "reference": ReferenceWorker,
    "reward": RewardWorker,
    "rollout": RolloutWorker,
}


@dataclass(frozen=True)
class Roles:
    """The typed fronts of the roles."""

    actor: ActorGroup
    critic: CriticGroup | None
    """None for a learner without a value function."""
    reference: ReferenceGroup
    reward: RewardGroup
    rollout: RolloutGroup

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every role that there is."""
        return (*self.trained, self.reference, self.reward, self.rollout)

    @property
    def trained(self) -> tuple[TrainedGroup, ...]:
        """The roles that a checkpoint has."""
        return (self.actor,) if self.critic is None else (self.actor, self.critic)

    def restarts(self) -> dict[str, float]:
        """Return how many workers of each role died so far under this controller."""
        return {
            f"restarts/{group.role}": float(group.supervisor.num_restarts)
            for group in self.groups
            if group.supervisor
        }

    def renew_trained(self, settings: Mapping[Role, RoleSettings]) -> None:
        """End all ranks of the trained roles, and start them from what `settings` name.

        The other roles stay, and forget what they were asked for. Raises as `launch` does.
        """
        for group in self.groups:
            group.give_up()
        if self.actor.turns is not None:
            self.actor.turns.give_up(ended=("actor", "critic"))
        wait_all(*[group.renew(settings[group.role]) for group in self.trained])

    def start(self, settings: Mapping[Role, RoleSettings]) -> None:
        """Load every model; when a rank that trains dies meanwhile, all that train start again.

        `settings` are those that the workers have. Raises RuntimeError when that happens too often.
        """
        others = [group for group in self.groups if group not in self.trained]
        started: list[Pending[None]] = []
        is_again = False
        while True:
            try:
                trained = [
                    group.renew(settings[group.role]) if is_again else group.start()
                    for group in self.trained
                ]
                for group in others[len(started) :]:
                    started.append(group.start())
                wait_all(*trained, *started)
                return
            except LearnerLost:
                is_again = True
                if self.actor.turns is not None:
                    self.actor.turns.give_up(ended=("actor", "critic"))


def cluster_nodes() -> list[dict[str, float]]:
    """Return the resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Bundles:
    """The placement group of a layout, and who is in each of its bundles."""

    def __init__(self, layout: Layout, *, wait_s: float) -> None:
        """A worker whose node is lost waits up to `wait_s` for another, and some seconds anyway."""
        self.layout = layout
        self.wait_s = max(wait_s, session.RELEASE_S)
        self.group = placement_group(list(layout.bundles), strategy=layout.strategy)
        self.turns = Turns() if layout.takes_turns else None
        self._workers: dict[int, Handle] = {}
        self._part = list(range(len(layout.bundles)))  # see `arrange`

    def ready(self, deadline_s: float) -> None:
        """Wait until every bundle has its node."""
        ready = Seat(self.group, 0).call("ready", lambda group: group.ready(), lasting=False)
        fix = f"{self.layout.bundles}; see `ray status` for who holds the resources"
        Pending("placement_group", "ready", [ready], nothing, deadline_s, fix).wait()
        nodes_of = placement_group_table(self.group)["bundles_to_node_id"]
        self._part = arrange(self.layout, [nodes_of[index] for index in range(len(nodes_of))])

    def fill(
        self, kind: type[AnyGroup], settings: Mapping[Role, RoleSettings], deadline_s: float
    ) -> AnyGroup:
        """Start the workers of a role in their bundles."""
        supervisor = Supervisor(kind.role, partial(self.spawn, kind.role), settings[kind.role])
        ranks = [place.rank for place in self.layout.places if place.role == kind.role]
        workers = [supervisor.spawn(rank, supervisor.settings) for rank in ranks]
        return kind(workers, deadline_s=deadline_s, supervisor=supervisor, turns=self.turns)

    def spawn(self, role: Role, rank: int, settings: RoleSettings) -> Handle:
        """Start a worker in the bundle of its place; who was there before is ended."""
        places = self.layout.places
        index = next(i for i, p in enumerate(places) if (p.role, p.rank) == (role, rank))
        place = self._placed(places[index])
        if index in self._workers:
            ray.kill(self._workers.pop(index))
        hosts = self._hosts(place)
        mine = replace(
            settings,
            rank=rank,
            world_size=place.world_size,
            num_gpus=place.gpus,
            spread=place.spread,
            gpu_share=place.share,
            takes_turns=self.layout.takes_turns,
            host=hosts[self._placed(places[index - rank]).bundle],  # ranks follow each other
        )
        strategy = PlacementGroupSchedulingStrategy(
            self.group,
            placement_group_bundle_index=place.bundle,
            placement_group_capture_child_tasks=bool(place.spread),  # processes of the engine
        )
        beside = {WEIGHTS: 1} if role == "rollout" and settings.ppo.interrupt else {}
        remote = ray.remote(concurrency_groups=beside)(WORKERS[role]).options(
            num_cpus=place.cpus, num_gpus=place.gpus, scheduling_strategy=strategy
        )
        self._workers[index] = remote.remote(mine)
        return self._workers[index]

    def _placed(self, place: Place) -> Place:
        """Return a place of the layout with the bundles of the placement group."""
        spread = tuple(self._part[index] for index in place.spread)
        return replace(place, bundle=self._part[place.bundle], spread=spread)

    def _hosts(self, place: Place) -> list[str]:
        """Return the address of the node of each bundle; Ray looks for another when one is lost.

        Raises TimeoutError, for `place`, when it finds none in time.
        """
        ends = time.monotonic() + self.wait_s
        next_line = time.monotonic()
        while (found := self._nodes()) is None:
            now = time.monotonic()
            nodes = ", ".join(f"{node.get('CPU', 0):g} CPU" for node in cluster_nodes())
            missing = (
                f"a node of the {place.role} worker {place.rank} or of its like is lost, and the "
                f"nodes left ({nodes}) have no place for {self.layout.bundles[place.bundle]}"
            )
            if now >= ends:
                raise TimeoutError(
                    f"ppo: {missing} within {self.wait_s:g} s: add a node and run the same command "
                    "again, or raise resources.wait_s"
                )
            if now >= next_line:
                console.say(f"ppo: waiting for a node, {ends - now:.0f} s left: {missing}")
                next_line = now + waiting.LINE_EVERY_S
            time.sleep(0.2)
        return found

    def _nodes(self) -> list[str] | None:
        """Return the address of the node of each bundle; None while Ray looks for one.

        The group counts as placed for a moment after a node was lost.
        """
        table = placement_group_table(self.group)
        alive = {
            node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]
        }
        nodes_of = table["bundles_to_node_id"]
        found = [alive.get(nodes_of.get(index)) for index in range(len(self.layout.bundles))]
        is_there = table["state"] == "CREATED" and None not in found
        return [str(address) for address in found] if is_there else None

    def close(self) -> None:
        """End every worker, and give the bundles back."""
        for worker in self._workers.values():
            ray.kill(worker)
        remove_placement_group(self.group)


def _patience_s(settings: Mapping[Role, RoleSettings], deadline_s: float) -> float:
    """Return how long a call on the reward role may take: its own calls have deadlines.

    One worker may have most responses, and starts a function again after each call that is late.
    """
    ppo = settings["reward"].ppo
    return deadline_s + slowest_s(ppo.rewards, ppo.num_responses)


@contextmanager
def launch(
    layout: Layout,
    settings: Mapping[Role, RoleSettings],
    *,
    deadline_s: float,
    wait_s: float = 0,
) -> Iterator[Roles]:
    """Start every worker of `layout`, all at the same time, and end them with the block.

    Raises TimeoutError when the placement group or a role is not ready after `deadline_s`, and
    when a node is lost and no other comes within `wait_s`.
    """
    bundles = Bundles(layout, wait_s=wait_s)
    try:
        bundles.ready(deadline_s)
        roles = Roles(
            actor=bundles.fill(ActorGroup, settings, deadline_s),
            critic=(
                bundles.fill(CriticGroup, settings, deadline_s) if "critic" in settings else None
            ),
            reference=bundles.fill(ReferenceGroup, settings, deadline_s),
            reward=bundles.fill(RewardGroup, settings, _patience_s(settings, deadline_s)),
            rollout=bundles.fill(RolloutGroup, settings, deadline_s),
        )
        if settings["actor"].ppo.weight_transfer == "broadcast":
            place = next(place for place in layout.places if place.role == "rollout")
            width = len(place.spread) or max(1, int(place.gpus))
            roles.rollout.broadcast = Broadcast(roles.actor, roles.rollout, width)
        roles.start(settings)
        yield roles
    finally:
        bundles.close()
