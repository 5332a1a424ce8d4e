"""A recipe on a cluster, all together: needs, what is missing, seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

from rayrlhf.config import Recipe, Role
from rayrlhf.planning import fit, needs
from rayrlhf.planning.devices import Cluster
from rayrlhf.planning.fit import Shortfall
from rayrlhf.planning.lengths import Lengths
from rayrlhf.planning.needs import Need
from rayrlhf.planning.speed import Rates, StepTime, ppo_step, stage_step


@dataclass(frozen=True)
class Estimate:
    """What `plan` knows of a recipe."""

    recipe: Recipe
    cluster: Cluster
    roles: Mapping[Role, Need]
    """Of PPO; {} without."""
    stages: Mapping[str, Need]
    lengths: Lengths | None
    shortfalls: tuple[Shortfall, ...]
    step: StepTime | None
    """Of PPO."""
    stage_steps: Mapping[str, StepTime]


def shortfalls_of(recipe: Recipe, cluster: Cluster) -> list[Shortfall]:
    """Return what is missing, without the times; raises RecipeError as `estimate` does."""
    fit.check_placement(recipe, cluster)
    roles = {} if recipe.ppo is None else needs.of_ppo(recipe, cluster.device)[0]
    return fit.shortfalls(recipe, cluster, roles, needs.of_stages(recipe, cluster.device))


def estimate(recipe: Recipe, cluster: Cluster, rates: Rates | None = None) -> Estimate:
    """Return the estimate; `rates` are measured ones.

    Raises RecipeError where workers have no place at all, or a model is not known.
    """
    fit.check_placement(recipe, cluster)
    roles: dict[Role, Need] = {}
    found = None
    if recipe.ppo is not None:
        roles, found = needs.of_ppo(recipe, cluster.device)
    stages = needs.of_stages(recipe, cluster.device)
    step = None if found is None else ppo_step(recipe, cluster, roles, found, rates)
    return Estimate(
        recipe,
        cluster,
        roles,
        stages,
        found,
        tuple(fit.shortfalls(recipe, cluster, roles, stages)),
        step,
        {name: stage_step(recipe, name, need, cluster, rates) for name, need in stages.items()},
    )
