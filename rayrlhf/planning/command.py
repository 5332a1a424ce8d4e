"""`rayrlhf plan`: print what a recipe needs and how long it takes, or refuse it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rayrlhf import console
from rayrlhf.config import Recipe
from rayrlhf.planning import advice, report
from rayrlhf.planning.devices import Cluster, of_nodes, parse_cluster, this_machine
from rayrlhf.planning.estimate import Estimate, estimate
from rayrlhf.planning.speed import Rates


def cluster_of(cluster: str | None, address: str | None) -> Cluster:
    """Return the cluster that is named, that a running Ray has, or this machine."""
    if cluster is not None:
        return parse_cluster(cluster)
    if address is not None:
        return of_nodes(address, _registered(address))
    return this_machine()


def _registered(address: str) -> Sequence[Mapping[str, float]]:
    """Return the resources of the nodes of a running Ray."""
    from rayrlhf.planning.running import nodes

    return nodes(address)


def measured(recipe: Recipe) -> Rates:
    """Return what this machine achieves on one layer of the recipe's model."""
    from rayrlhf.planning.probe import probe

    return probe(recipe)


def plan(
    recipe: Recipe,
    cluster: Cluster,
    *,
    rates: Rates | None = None,
    simulation: Path | None = None,
) -> Estimate:
    """Print the plan of `recipe` on `cluster`; `simulation` is where the plot of a run goes.

    Raises RecipeError where it does not fit, with what is missing and what would help.
    """
    now = estimate(recipe, cluster, rates)
    if now.shortfalls:
        raise report.refusal(now, advice.that_fits(now))
    device = cluster.device
    console.say(
        f"{recipe.name} on {cluster.says}: {cluster.num_nodes} node(s) of {cluster.per_node} "
        f"{device.name}, ${device.price:g} an hour each ({device.price_source})"
    )
    if now.stages or now.roles:
        console.say("\nGiB of a process on its device, and of the host's memory besides:")
        console.say(report.memory_table(now))
    if now.lengths is not None:
        console.say(
            f"\nlengths: {now.lengths.prompt:.0f} + {now.lengths.response:.0f} tokens "
            f"({now.lengths.source})"
        )
    if now.stages or now.roles:
        console.say(f"\nspeed by {rates.source if rates else 'the table of devices'}:")
    for line in report.time_lines(now):
        console.say(line)
    helps = advice.that_helps(now, rates)
    if helps is not None:
        console.say(report.change_line(helps[0], now, helps[1]))
    elif now.step is not None:
        console.say("no single change that plan knows makes a step shorter by 3%")
    if simulation is not None and now.step is not None:
        from rayrlhf.planning.simulate import simulate_sizes

        for line in simulate_sizes(now, simulation):
            console.say(line)
    return now
