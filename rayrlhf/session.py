"""The connection to Ray: join the cluster that RAY_ADDRESS names, or start a local one.

`require` compares what a stage asks for with what the nodes have, before any actor starts, so that
a shortage is an error with a name instead of a placement group that waits for ever.
"""

import os
import time
from collections.abc import Mapping, Sequence

import ray

from rayrlhf import console
from rayrlhf.config import Recipe, RecipeError

Bundle = Mapping[str, float]


def connect(recipe: Recipe) -> None:
    """Initialise Ray once per process; workers import this very copy of the package."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    local = {"include_dashboard": False} if is_local() else {}
    env = {"TOKENIZERS_PARALLELISM": "false", "RAY_TRAIN_V2_ENABLED": "1"}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="warning",
        namespace=f"rayrlhf-{recipe.name}",
        runtime_env={"env_vars": env},
        **local,
    )


def is_local() -> bool:
    """Tell whether `connect` starts a Ray of its own on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def require(bundles: Sequence[Bundle], *, wait_s: float = 0, stage: str = "") -> None:
    """Return when every bundle fits on the cluster's nodes together.

    With `wait_s`, waits that long for an autoscaler, with a line every 30 s that says what is
    registered and what is missing. Raises RecipeError that names the first missing resource.
    """
    deadline = time.monotonic() + wait_s
    next_line = time.monotonic()
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        missing = shortage(bundles, nodes)
        if missing is None:
            return
        now = time.monotonic()
        if now >= deadline:
            raise RecipeError(f"{stage}: {missing}")
        if now >= next_line:
            console.say(f"{stage}: waiting for the cluster, {deadline - now:.0f} s left: {missing}")
            next_line = now + 30
        time.sleep(min(1.0, deadline - now))


def shortage(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> str | None:
    """Say what is missing to hold every bundle on `nodes`, or None when all fit.

    First-fit decreasing: exact for equal bundles, and what PACK placement does for mixed ones.
    """
    free = [dict(node) for node in nodes]
    for resource in sorted({name for bundle in bundles for name in bundle}, key=str.lower):
        wanted = sum(bundle.get(resource, 0) for bundle in bundles)
        have = sum(node.get(resource, 0) for node in free)
        if wanted > have + 1e-9:
            return (
                f"{wanted:g} {resource} asked for, {have:g} registered on {len(free)} node(s): "
                f"lower resources.*, or add nodes with {resource}"
            )
    for bundle in sorted(bundles, key=lambda b: (-b.get("GPU", 0), -b.get("CPU", 0))):
        place = next(
            (
                node
                for node in free
                if all(node.get(name, 0) + 1e-9 >= amount for name, amount in bundle.items())
            ),
            None,
        )
        if place is None:
            asked = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            largest = {
                name: max((node.get(name, 0) for node in free), default=0) for name in bundle
            }
            short = next((name for name, amount in bundle.items() if largest[name] < amount), "CPU")
            return (
                f"a worker asks for {asked} on one node, but no node has that much {short} "
                f"left ({largest[short]:g}): lower resources.*, or add a larger node"
            )
        for name, amount in bundle.items():
            place[name] = place.get(name, 0) - amount
    return None
