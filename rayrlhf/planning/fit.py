"""Whether a recipe fits a cluster: device by device, node by node, and what is missing where not.

On GPUs of their own (`layout: disaggregated`), or parts of one (`shares`), roles are awake at the
same time, and what they hold adds up. With `layout: colocated` a device holds the resting parts of
all roles on it and, in each turn, what is awake (rl/turns.py):

    rollout  the engine's part of the device
    none     forward passes: graphs that actor and critic keep for the update, reference, reward
    actor    its gradients, its moments, its activations, beside the graphs of the critic
    critic   the like

Without GPUs all processes share the memory of their node, and nothing sleeps.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rayrlhf import session
from rayrlhf.config import Recipe, RecipeError, Role
from rayrlhf.planning.devices import Cluster
from rayrlhf.planning.memory import MARGIN, Memory
from rayrlhf.planning.needs import Need
from rayrlhf.rl import layout as layouts

HOST_PART = 0.95
"""Of a node's memory that processes may take; the system has the rest."""
ONE_SEQUENCE = 1.0
"""Sequences of the longest length whose keys and values an engine must have room for."""


@dataclass(frozen=True)
class Shortfall:
    """Memory that is not there."""

    who: str
    """Role or stage that takes the most of it."""
    where: str
    """Device or node."""
    needed: float
    """Bytes, as the next."""
    there: float

    @property
    def missing(self) -> float:
        """Bytes that are missing."""
        return self.needed - self.there


def on_device(held: Memory) -> float:
    """Return what a process takes of its device, with the margin for what comes and goes."""
    return max(held.kept + MARGIN * held.passing, held.starts)


def check_placement(recipe: Recipe, cluster: Cluster) -> None:
    """Raise RecipeError where workers have no place, whatever they hold."""
    for stage in recipe.stages:
        if recipe.training(stage) is not None:
            missing = session.shortage(recipe.resources.bundles(stage), cluster.nodes)
            if missing is not None:
                raise RecipeError(f"{stage}: {missing}")
    if recipe.ppo is not None:
        layouts.plan(recipe, cluster.nodes)


def shortfalls(
    recipe: Recipe, cluster: Cluster, ppo: Mapping[Role, Need], stages: Mapping[str, Need]
) -> list[Shortfall]:
    """Return what is missing: on devices, then on nodes, the most first; [] where all fits."""
    found = [*_of_stages(recipe, cluster, stages)]
    if ppo:
        found += _of_ppo(recipe, cluster, ppo)
    return sorted(found, key=lambda short: ("memory of" in short.where, -short.missing))


def _of_stages(recipe: Recipe, cluster: Cluster, stages: Mapping[str, Need]) -> Iterator[Shortfall]:
    for name, need in stages.items():
        if need.device.is_gpu:
            on_one = int(1 / recipe.resources.gpus_per_worker + 1e-9)
            per_gpu = min(need.num_workers, on_one)
            needed = per_gpu * on_device(need.memory)
            yield from _if_short(name, f"a GPU ({cluster.device.name})", needed, cluster)
            by_cpus = int(cluster.num_cpus / recipe.resources.cpus_per_worker)
            per_node = min(need.num_workers, cluster.per_node * per_gpu, max(1, by_cpus))
        else:
            per_node = -(-need.num_workers // cluster.num_nodes)
        host = per_node * (need.imports + host_peak(need))
        yield from _if_host_short(name, host, cluster)


def _of_ppo(recipe: Recipe, cluster: Cluster, needs: Mapping[Role, Need]) -> Iterator[Shortfall]:
    layout = layouts.plan(recipe)
    seen: set[tuple[tuple[str, int], ...]] = set()
    for roles in _devices(cluster, layout):
        key = tuple(sorted((role, count) for role, count in roles.items()))
        if key in seen:
            continue
        seen.add(key)
        here = [needs[role] for role, count in roles.items() for _ in range(count)]
        turns = _turns(here) if layout.takes_turns and len(here) > 1 else _together(here)
        for who, needed in turns:
            others = ", ".join(role for role in roles if role != who)
            where = f"a GPU ({cluster.device.name})" + (f" with {others}" if others else "")
            yield from _if_short(who, where, needed, cluster)
    rollout = needs["rollout"]
    if rollout.device.is_gpu:
        yield from _cache_short(recipe, rollout, cluster)
    for who, host in _hosts(recipe, cluster, layout, needs):
        yield from _if_host_short(who, host, cluster)


def _devices(cluster: Cluster, layout: layouts.Layout) -> list[dict[Role, int]]:
    """Return the workers of each role on each GPU, or on the GPUs that one worker has.

    Bundles of a part of a GPU come to the fullest one of their node that has room, as in Ray.
    """
    found: list[dict[Role, int]] = []
    shared: list[_SharedGPU] = []
    roles_of, nodes = _roles_of(layout), _nodes_of(cluster, layout)
    for bundle, (roles, node) in enumerate(zip(roles_of, nodes, strict=True)):
        share = layout.bundles[bundle].get("GPU", 0.0)
        if share >= 1:
            found.append(roles)
        elif share > 0:
            fitting = [gpu for gpu in shared if gpu.node == node and gpu.free + 1e-9 >= share]
            if not fitting:
                fitting = [_SharedGPU(node)]
                shared += fitting
            gpu = min(fitting, key=lambda gpu: gpu.free)
            gpu.free -= share
            gpu.roles.update(roles)
    return found + [dict(gpu.roles) for gpu in shared]


@dataclass
class _SharedGPU:
    """A GPU of which bundles have parts."""

    node: int
    free: float = 1.0
    roles: Counter[Role] = field(default_factory=Counter)


def _roles_of(layout: layouts.Layout) -> list[dict[Role, int]]:
    """Return the workers of each role in each bundle."""
    found: list[dict[Role, int]] = [{} for _ in layout.bundles]
    for place in layout.places:
        for bundle in place.spread or (place.bundle,):
            found[bundle][place.role] = found[bundle].get(place.role, 0) + 1
    return found


def _engine_takes(need: Need) -> float:
    """Return what an engine takes of a GPU, at least all that it needs."""
    held = need.memory
    return held.weights + held.outputs + held.buffers + max(0.0, held.cache)


def _together(here: Sequence[Need]) -> list[tuple[str, float]]:
    """Return (who has the most, bytes) where all are awake."""
    sizes: dict[str, float] = {}
    for need in here:
        size = _engine_takes(need) if need.name == "rollout" else on_device(need.memory)
        sizes[need.name] = sizes.get(need.name, 0.0) + size
    return [(max(sizes, key=lambda name: sizes[name]), sum(sizes.values()))]


def _turns(here: Sequence[Need]) -> list[tuple[str, float]]:
    """Return (who has its turn, bytes on the device) for each turn."""
    held = {need.name: need.memory for need in here}
    resting = {name: _resting(name, held[name]) for name in held}
    everyone = sum(resting.values())
    graphs = {name: _graphs(held[name]) for name in ("actor", "critic") if name in held}
    forward = {
        name: MARGIN * held[name].passing for name in ("reference", "reward") if name in held
    }
    turns = []
    for name in held:
        if name == "rollout":
            need = next(each for each in here if each.name == name)
            turns.append((name, everyone - resting[name] + _engine_takes(need)))
        elif name in graphs:
            kept = sum(size for other, size in graphs.items() if other != name)
            awake = everyone - resting[name] + on_device(held[name]) + kept
            turns.append((name, awake))
    if forward or graphs:
        every = graphs | forward
        most = max(every, key=lambda name: every[name] + resting[name])
        turns.append((most, everyone + sum(every.values())))
    return turns


def _resting(name: str, held: Memory) -> float:
    # A process of vLLM that sleeps has its context, and nothing else.
    return 0.6 * 2**30 if name == "rollout" else held.resting


def _graphs(held: Memory) -> float:
    return MARGIN * (held.activations + held.outputs)


def _cache_short(recipe: Recipe, need: Need, cluster: Cluster) -> Iterator[Shortfall]:
    """Yield a shortfall where an engine has no room for the keys and values of one sequence."""
    assert recipe.ppo is not None
    b = 2 if recipe.ppo.actor.precision == "bfloat16" else 4
    kv = need.shape.kv_bytes_per_token(b) / min(need.width, need.shape.num_kv_heads)
    wanted = ONE_SEQUENCE * recipe.model.max_length * kv
    if need.memory.cache < wanted:
        part = recipe.resources.rollout_gpu_memory
        there = part * cluster.device.memory
        where = f"the part rollout_gpu_memory={part:g} of a GPU ({cluster.device.name})"
        yield Shortfall("rollout", where, there - need.memory.cache + wanted, there)


def host_peak(need: Need) -> float:
    """Return what a process takes of the host's memory beside its imports."""
    held = need.memory
    return max(held.host, held.host_starts) if need.device.is_gpu else held.total + held.host


def _hosts(
    recipe: Recipe, cluster: Cluster, layout: layouts.Layout, needs: Mapping[Role, Need]
) -> list[tuple[str, float]]:
    """Return (role that takes the most, bytes of host memory) of each node."""
    nodes: list[dict[Role, float]] = [{} for _ in range(cluster.num_nodes)]
    of_bundle = _nodes_of(cluster, layout)
    for place in layout.places:
        need = needs[place.role]
        size = need.imports + host_peak(need)
        if layout.takes_turns and need.device.is_gpu:
            size = max(size, need.imports + need.memory.moments)
        if place.role == "actor" and place.rank == 0 and need.device.is_gpu:
            size += 4.0 * need.shape.num_params  # it writes checkpoints
        node = nodes[of_bundle[place.bundle]]
        node[place.role] = node.get(place.role, 0.0) + size
    return [(max(node, key=lambda role: node[role]), sum(node.values())) for node in nodes if node]


def _nodes_of(cluster: Cluster, layout: layouts.Layout) -> list[int]:
    """Return the node of each bundle, about as Ray's strategies place them."""
    free = cluster.nodes
    spreads = "SPREAD" in layout.strategy
    found = []
    for bundle in layout.bundles:
        fitting = [
            index
            for index, node in enumerate(free)
            if all(node.get(name, 0) + 1e-9 >= amount for name, amount in bundle.items())
        ]
        key = "GPU" if bundle.get("GPU") else "CPU"
        chosen = (
            max(fitting, key=lambda index: (free[index].get(key, 0), -index))
            if spreads and fitting
            else next(iter(fitting), 0)
        )
        for name, amount in bundle.items():
            free[chosen][name] = free[chosen].get(name, 0) - amount
        found.append(chosen)
    return found


def _if_short(who: str, where: str, needed: float, cluster: Cluster) -> Iterator[Shortfall]:
    if needed > cluster.device.memory:
        yield Shortfall(who, where, needed, cluster.device.memory)


def _if_host_short(who: str, needed: float, cluster: Cluster) -> Iterator[Shortfall]:
    there = HOST_PART * cluster.host_memory
    if needed > there:
        where = "the memory of a node" if cluster.num_nodes > 1 else "the memory of the machine"
        yield Shortfall(who, where, needed, there)
