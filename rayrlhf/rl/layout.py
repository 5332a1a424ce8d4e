"""Where the workers of PPO go: a pure function of the recipe, a table of places and bundles.

disaggregated   every worker has a bundle of its own; an engine of several GPUs one with all of
                them. `shares` puts the workers of a role beside those of another: each takes
                what it asks for of a bundle that holds both.
colocated       worker i of every role is on device i, an engine of k GPUs on devices i * k to
                i * k + k - 1, and the roles take turns (turns.py): a bundle holds one device
                and the CPUs of the largest of its workers, and each takes an equal part of it.
                Roles without a GPU stay beside where the others have some.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayrlhf import session
from rayrlhf.config import Recipe, RecipeError, ResourcesConfig, Role

Bundle = dict[str, float]


@dataclass(frozen=True)
class Place:
    """One worker: its role, its rank in the role, and what it takes of its bundle."""

    role: Role
    rank: int
    world_size: int
    cpus: float
    gpus: float
    bundle: int
    """Which one of the placement group."""
    spread: tuple[int, ...] = ()
    """Bundles of an engine's GPUs where these are in several: its processes there take `share`."""
    share: float = 0.0
    """Part of each of these GPUs that it takes."""


@dataclass(frozen=True)
class Layout:
    """All workers of PPO, role by role, and the bundles that hold them."""

    places: tuple[Place, ...]
    bundles: tuple[Bundle, ...]
    strategy: str
    takes_turns: bool = False
    """Whether roles share devices that they do not fit on together."""

    @property
    def demand(self) -> list[Bundle]:
        """What single nodes must hold: every bundle, or their sum where one node holds all."""
        if self.strategy != "STRICT_PACK":
            return [dict(bundle) for bundle in self.bundles]
        names = dict.fromkeys(name for bundle in self.bundles for name in bundle)
        return [{name: sum(bundle.get(name, 0) for bundle in self.bundles) for name in names}]


def plan(recipe: Recipe, nodes: Sequence[Mapping[str, float]] | None = None) -> Layout:
    """Return the layout of the PPO roles; with `nodes` (resources of each), check that it fits.

    Raises RecipeError that names the resource that is short.
    """
    resources = recipe.resources
    places: list[Place] = []
    bundles: list[Bundle] = []
    for together in _neighbours(resources, recipe.roles):
        cut = _in_turns if resources.layout == "colocated" and len(together) > 1 else _side_by_side
        new_places, new_bundles = cut(resources, together, len(bundles))
        places += new_places
        bundles += new_bundles
    places.sort(key=lambda place: recipe.roles.index(place.role))
    layout = Layout(
        tuple(places), tuple(bundles), resources.placement, resources.layout == "colocated"
    )
    if nodes is not None:
        missing = session.shortage(layout.demand, nodes)
        if missing is None and layout.strategy == "STRICT_SPREAD" and len(nodes) < len(bundles):
            missing = (
                f"resources.placement=STRICT_SPREAD asks for {len(bundles)} nodes, "
                f"{len(nodes)} registered: add nodes, or set resources.placement=SPREAD"
            )
        if missing is not None:
            raise RecipeError(f"ppo: {missing}")
    return layout


def arrange(layout: Layout, nodes: Sequence[str]) -> list[int]:
    """Return, for each bundle of the layout, which bundle of the placement group takes its part.

    `nodes[i]` is where Ray put bundle i. It orders equal bundles as it likes and so tears engines
    of several GPUs apart; here equal ones change places until each engine is on one node, if the
    nodes that Ray chose allow that.
    """
    shapes = [tuple(sorted(bundle.items())) for bundle in layout.bundles]
    free = dict.fromkeys(range(len(nodes)))
    part: dict[int, int] = {}
    for place in layout.places:
        choices = [
            chosen
            for node in dict.fromkeys(nodes)
            if (chosen := _of_one_node(place.spread, shapes, [i for i in free if nodes[i] == node]))
        ]
        if choices:
            # The fullest node: what has more room is left for the next engine.
            best = min(choices, key=lambda chosen: sum(nodes[i] == nodes[chosen[0]] for i in free))
            part.update(zip(place.spread, best, strict=True))
            for index in best:
                del free[index]
    for index, shape in enumerate(shapes):
        if index not in part:
            own = [index] if index in free else [i for i in free if shapes[i] == shape]
            part[index] = own[0]
            del free[own[0]]
    return [part[index] for index in range(len(shapes))]


def _of_one_node(
    spread: Sequence[int], shapes: Sequence[object], free: Sequence[int]
) -> list[int] | None:
    """Return which of the `free` bundles can stand for those of `spread`; None for too few."""
    chosen: list[int] = []
    for index in spread:
        like = [i for i in free if shapes[i] == shapes[index] and i not in chosen]
        if not like:
            return None
        chosen.append(index if index in like else like[0])
    return chosen


def _neighbours(resources: ResourcesConfig, roles: Sequence[Role]) -> list[list[Role]]:
    """Return which roles share devices, each of them in one list."""
    if resources.layout == "colocated":
        on_gpu: list[Role] = [role for role in roles if resources.role(role).gpus]
        together = on_gpu or list(roles)
        return [together, *([role] for role in roles if role not in together)]
    hosts = {role: resources.role(role).shares or role for role in roles}
    # Where the host is a role that this learner lacks, its guests are on their own.
    hosts = {role: host if host in roles else role for role, host in hosts.items()}
    return [
        [guest for guest in roles if hosts[guest] == role] for role in roles if hosts[role] == role
    ]


def _side_by_side(
    resources: ResourcesConfig, roles: Sequence[Role], first: int
) -> tuple[list[Place], list[Bundle]]:
    """Bundle `first` + i holds worker i of every role, each with what it asks for."""
    needs = {role: resources.role(role) for role in roles}
    places = [
        Place(role, rank, own.num_workers, own.cpus, own.gpus, first + rank)
        for role, own in needs.items()
        for rank in range(own.num_workers)
    ]
    bundles = []
    for rank in range(max(own.num_workers for own in needs.values())):
        here = [own for own in needs.values() if rank < own.num_workers]
        bundles.append(_bundle(sum(own.cpus for own in here), sum(own.gpus for own in here)))
    return places, bundles


def _in_turns(
    resources: ResourcesConfig, roles: Sequence[Role], first: int
) -> tuple[list[Place], list[Bundle]]:
    """Bundle `first` + i holds device i, and every worker on it takes an equal part."""
    needs = {role: resources.role(role) for role in roles}
    widths = {role: max(1, int(own.gpus)) for role, own in needs.items()}
    devices = {role: own.num_workers * widths[role] for role, own in needs.items()}
    has_gpu = any(own.gpus for own in needs.values())
    bundles, parts = [], []
    for device in range(max(devices.values())):
        here = [needs[role] for role in roles if device < devices[role]]
        bundles.append(_bundle(max(own.cpus for own in here), 1.0 if has_gpu else 0.0))
        parts.append(len(here))
    places = []
    for role, own in needs.items():
        for rank in range(own.num_workers):
            mine = range(rank * widths[role], (rank + 1) * widths[role])
            gpus = min(_part(1.0, parts[device]) for device in mine) if has_gpu else 0.0
            cpus = _part(bundles[mine[0]]["CPU"], parts[mine[0]])
            place = Place(role, rank, own.num_workers, cpus, gpus, first + mine[0])
            if len(mine) > 1:
                spread = tuple(first + device for device in mine)
                place = Place(
                    role, rank, own.num_workers, cpus, 0.0, first + mine[0], spread, share=gpus
                )
            places.append(place)
    return places, bundles


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def _part(amount: float, parts: int) -> float:
    """Return a part of `amount`, rounded down to what Ray counts in: all of them fit."""
    return math.floor(amount / parts * 10_000 + 1e-6) / 10_000
