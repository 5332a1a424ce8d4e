"""Changes of a recipe, tried one by one: which make it fit, and which make it faster.

A change is a few overrides, as on the command line. Those for memory are tried from the smallest
to the largest, by what they cost: those that only change how something is computed come before
those that take more devices, and LoRA, which trains another model, comes last. Where no single one
is enough, pairs are tried of those that save something.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Any

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.planning.devices import Cluster
from rayrlhf.planning.estimate import Estimate, estimate, shortfalls_of
from rayrlhf.planning.fit import Shortfall
from rayrlhf.planning.speed import Rates

Change = tuple[tuple[str, Any], ...]
"""(key, value) of overrides."""
MOST_PAIRS = 100
"""Pairs of changes that are tried: the answer is there within a second."""
SMALLEST_GAIN = 0.03
"""Of the step's time, from which a change is worth a line."""
TRAINED_ROLES = ("actor", "critic")


def written(change: Change) -> str:
    """Return a change as it is typed."""
    return " ".join(f"{key}={_yaml(value)}" for key, value in change)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "'{}'" if value == {} else f"{value:g}" if isinstance(value, float) else str(value)


def changed(recipe: Recipe, change: Change) -> Recipe:
    """Return the recipe with a change; raises RecipeError where it is not allowed."""
    tree = recipe.model_dump(mode="python")
    for key, value in change:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return parse(tree)


def that_fits(now: Estimate) -> Change | None:
    """Return the smallest change with which the recipe fits; None: none that is tried does."""
    blamed = [short.who for short in now.shortfalls]
    missing = _missing(now.shortfalls)
    halves: list[Change] = []
    for change in _for_memory(now.recipe, now.cluster, blamed):
        left = _left(now.recipe, now.cluster, change)
        if left == 0:
            return change
        if left < missing:
            halves.append(change)
    for first, second in islice(combinations(halves, 2), MOST_PAIRS):
        keys = [key for key, _ in first + second]
        if len(set(keys)) == len(keys) and _left(now.recipe, now.cluster, first + second) == 0:
            return first + second
    return None


def _left(recipe: Recipe, cluster: Cluster, change: Change) -> float:
    """Return the bytes that are missing with a change; infinity where it is refused."""
    try:
        other = changed(recipe, change)
        return _missing(shortfalls_of(other, cluster))
    except RecipeError:
        return math.inf


def _missing(shortfalls: Sequence[Shortfall]) -> float:
    return sum(short.missing for short in shortfalls)


def that_helps(now: Estimate, rates: Rates | None = None) -> tuple[Change, Estimate] | None:
    """Return the change with the shortest PPO step, and what then is; None if none helps."""
    if now.step is None:
        return None
    best: tuple[Change, Estimate] | None = None
    shortest = now.step.seconds * (1 - SMALLEST_GAIN)
    for change in _for_speed(now.recipe):
        found = _tried(now.recipe, now.cluster, change, rates)
        if found is None or found.shortfalls or found.step is None:
            continue
        if found.step.seconds < shortest:
            best, shortest = (change, found), found.step.seconds
    return best


def _tried(
    recipe: Recipe, cluster: Cluster, change: Change, rates: Rates | None = None
) -> Estimate | None:
    """Return the estimate of a changed recipe, None where it is refused."""
    try:
        return estimate(changed(recipe, change), cluster, rates)
    except RecipeError:
        return None


def _for_memory(recipe: Recipe, cluster: Cluster, blamed: Sequence[str]) -> Iterator[Change]:
    """Yield changes that save memory where it is short, the smallest first."""
    trained = [name for name in TRAINED_ROLES if recipe.ppo is not None and name in recipe.roles]
    stages = [name for name in recipe.stages if recipe.training(name) is not None]
    places = [f"ppo.{name}" for name in trained] + stages
    first = [place for place in places if place.rpartition(".")[2] in blamed]
    places = first + [place for place in places if place not in first]
    if "rollout" in blamed or recipe.resources.layout == "colocated":
        yield from _parts_of_the_engine(recipe)
    for place in places:
        yield from _smaller_batches(recipe, place)
    for place in places:
        yield ((f"{place}.gradient_checkpointing", True),)
    for place in places:
        yield from _sharded(recipe, place)
    for place in places:
        yield ((f"{place}.offload", "cpu"),)
    if recipe.ppo is not None:
        yield from _more_workers(recipe, cluster, blamed)
    for place in places:
        if place != "pretrain":
            yield ((f"{place}.lora", {}),)


def _parts_of_the_engine(recipe: Recipe) -> Iterator[Change]:
    resources = recipe.resources
    if resources.rollout.gpus:
        for part in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.9):
            if part != resources.rollout_gpu_memory:
                yield (("resources.rollout_gpu_memory", part),)
        own = resources.rollout
        for width in (2, 4, 8):
            if width > own.gpus and own.num_workers * int(own.gpus) % width == 0:
                engines = own.num_workers * max(1, int(own.gpus)) // width
                yield (
                    ("resources.rollout.gpus", float(width)),
                    ("resources.rollout.num_workers", engines),
                )
    elif recipe.ppo is not None and recipe.ppo.rollout_memory_gib > 0.25:
        yield (("ppo.rollout_memory_gib", recipe.ppo.rollout_memory_gib / 2),)


def _smaller_batches(recipe: Recipe, place: str) -> Iterator[Change]:
    tokens = _section(recipe, place).tokens_per_microbatch
    for part in (2, 4, 8):
        if tokens // part >= 256:
            yield ((f"{place}.tokens_per_microbatch", tokens // part),)


def _sharded(recipe: Recipe, place: str) -> Iterator[Change]:
    yield ((f"{place}.backend", "fsdp"), (f"{place}.zero_stage", 0))
    for stage in (1, 2, 3):
        if _section(recipe, place).zero_stage < stage:
            yield ((f"{place}.backend", "deepspeed"), (f"{place}.zero_stage", stage))


def _more_workers(recipe: Recipe, cluster: Cluster, blamed: Sequence[str]) -> Iterator[Change]:
    if not cluster.num_gpus:
        return
    for role in recipe.roles:
        count = recipe.resources.role(role).num_workers
        if role in blamed:
            yield ((f"resources.{role}.num_workers", 2 * count),)
            yield ((f"resources.{role}.num_workers", 4 * count),)


def _section(recipe: Recipe, place: str) -> Any:
    if place.startswith("ppo."):
        assert recipe.ppo is not None
        return recipe.ppo.actor if place == "ppo.actor" else recipe.ppo.critic
    return recipe.training(place)


def _for_speed(recipe: Recipe) -> Iterator[Change]:
    """Yield changes that may shorten a PPO step and leave what is learned nearly as it is."""
    yield from _other_workers(recipe)
    yield from _other_training(recipe)
    cfg, resources = recipe.ppo, recipe.resources
    assert cfg is not None
    if cfg.actor.precision == "float32" and resources.actor.gpus:
        yield (("ppo.actor.precision", "bfloat16"), ("ppo.critic.precision", "bfloat16"))
    if not cfg.max_staleness and resources.layout == "disaggregated":
        yield (("ppo.max_staleness", 1),)
    if cfg.old_log_probs == "actor" and not cfg.max_staleness:
        yield (("ppo.old_log_probs", "rollout"),)
    for part in (0.6, 0.7, 0.8, 0.9):
        if resources.rollout.gpus and part > resources.rollout_gpu_memory:
            yield (("resources.rollout_gpu_memory", part),)


def _other_workers(recipe: Recipe) -> Iterator[Change]:
    resources = recipe.resources
    workers: dict[str, int] = {role: resources.role(role).num_workers for role in recipe.roles}
    for role, count in workers.items():
        yield ((f"resources.{role}.num_workers", 2 * count),)
        for other, theirs in workers.items():
            if role != other and theirs % 2 == 0:
                yield (
                    (f"resources.{role}.num_workers", count + theirs // 2),
                    (f"resources.{other}.num_workers", theirs // 2),
                )
    own = resources.rollout
    if own.gpus > 1:
        yield (
            ("resources.rollout.gpus", own.gpus // 2),
            ("resources.rollout.num_workers", 2 * own.num_workers),
        )


def _other_training(recipe: Recipe) -> Iterator[Change]:
    for role in TRAINED_ROLES:
        if role not in recipe.roles:
            continue
        section = _section(recipe, f"ppo.{role}")
        yield ((f"ppo.{role}.tokens_per_microbatch", 2 * section.tokens_per_microbatch),)
        if section.gradient_checkpointing:
            yield ((f"ppo.{role}.gradient_checkpointing", False),)
        if section.offload != "none":
            yield ((f"ppo.{role}.offload", "none"),)
