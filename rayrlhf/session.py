"""The connection to Ray: join the cluster that RAY_ADDRESS names, or start a local one.

`require` compares what a stage asks for with what the nodes have, and with what is free there,
before any actor starts, so that a shortage is an error with a name instead of a placement group
that waits for ever.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import state as ray_state
from ray.autoscaler.sdk import request_resources

from rayrlhf import console
from rayrlhf.config import Recipe, RecipeError

Bundle = Mapping[str, float]

NUM_LISTED = 8
"""Nodes that an error says the resources of."""
HEAD = "node:__internal_head__"
"""Ray's mark of the head node, which has its address besides."""
LINE_EVERY_S = 30.0
"""Seconds between the lines that say what a wait is for."""
RELEASE_S = 20.0
"""How long, at least, resources in use are waited for: Ray takes seconds to see a stage's end."""
SERVE = {
    # Serve kills a proxy that is not ready in 5 s, and on a busy machine none ever is.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ten looks of its controller a second, as many of each process at its counters, and threads of
    # their own for loops that never block, take 5% of a laptop from the engine. A dead replica is
    # seen 1 s later, and Ray reports counters every 10 s anyway.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
QUIET = {"REPORTER_UPDATE_INTERVAL_MS": "60000"}
"""Of a Ray that this command starts: its agent measures all processes every 5 s for a dashboard."""


CPU_ROLES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Ray leaves all GPUs of a node visible to a worker that asked for none."""


def connect(recipe: Recipe, *, keeps_idle: bool = True) -> None:
    """Initialise Ray once per process; workers import this very copy of the package.

    Without `keeps_idle` a Ray that starts here ends workers that have nothing to do, where it would
    keep some for tasks to come.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    local: dict[str, Any] = {}
    if is_local():
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        local["include_dashboard"] = False
        if not keeps_idle:
            local["_system_config"] = {"num_workers_soft_limit": 0}
    env = {"TOKENIZERS_PARALLELISM": "false", "RAY_TRAIN_V2_ENABLED": "1", **SERVE, **CPU_ROLES}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="warning",
        namespace=f"rayrlhf-{recipe.name}",
        runtime_env={"env_vars": env},
        **local,
    )
    if is_local():
        # It reads all logs ten times a second, for drivers that ask for them.
        ray._private.worker.global_worker.node.kill_log_monitor(check_alive=False)


def is_local() -> bool:
    """Tell whether `connect` starts a Ray of its own on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def require(bundles: Sequence[Bundle], *, wait_s: float = 0, stage: str = "") -> None:
    """Return when every bundle fits on the cluster's nodes together, beside what is in use.

    With `wait_s`, asks the autoscaler for nodes and waits that long for it, or for other jobs, with
    a line every 30 s that says what is missing. Raises RecipeError that names the first missing
    resource and, where it is registered but in use, who holds it.
    """
    has_asked = False
    started = next_ask = time.monotonic()
    # What the stage before held is released in a moment: no line for that.
    next_line = started if wait_s > 0 else started + 3
    try:
        while True:
            nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            missing = shortage(bundles, list(nodes.values()))
            left_s = started + wait_s - time.monotonic()
            if missing is None:
                free = ray_state.available_resources_per_node()
                missing = in_use(
                    bundles, list(nodes.values()), [free.get(node, {}) for node in nodes]
                )
                left_s = max(left_s, started + RELEASE_S - time.monotonic())
                used = [_less(node, free.get(key, {})) for key, node in nodes.items()]
            else:
                used = []
            if missing is None:
                return
            if wait_s > 0 and left_s > 0 and time.monotonic() >= next_ask:
                # Nothing else does: an actor that waits for its place comes after this check. Ray
                # takes a request for all that there is to be, and forgets it for another job's.
                request_resources(bundles=_positive([*bundles, *used]))
                has_asked, next_ask = True, time.monotonic() + LINE_EVERY_S
            if left_s <= 0:
                raise RecipeError(f"{stage}: {missing}")
            if time.monotonic() >= next_line:
                console.say(f"{stage}: waiting for the cluster, {left_s:.0f} s left: {missing}")
                next_line = time.monotonic() + LINE_EVERY_S
            time.sleep(min(0.5, left_s))
    finally:
        if has_asked:  # or the nodes would stay for ever
            request_resources(bundles=[])


def _less(node: Bundle, free: Bundle) -> Bundle:
    return {name: node[name] - free.get(name, 0) for name in ("CPU", "GPU") if name in node}


def _positive(bundles: Sequence[Bundle]) -> list[dict[str, float]]:
    found = [{name: amount for name, amount in each.items() if amount > 0} for each in bundles]
    return [each for each in found if each]


def in_use(
    bundles: Sequence[Bundle], nodes: Sequence[Bundle], free: Sequence[Bundle]
) -> str | None:
    """Say who holds what is missing to hold every bundle on what is `free`, or None.

    `free[i]` is what is left of `nodes[i]`, which hold every bundle when nothing is in use.
    """
    if shortage(bundles, free) is None:
        return None
    amounts = [
        f"{sum(bundle.get(name, 0) for bundle in bundles):g} {name} asked for, "
        f"{sum(node.get(name, 0) for node in free):g} of "
        f"{sum(node.get(name, 0) for node in nodes):g} free"
        for name in sorted({name for bundle in bundles for name in bundle}, key=str.lower)
        if any(bundle.get(name, 0) for bundle in bundles)
    ]
    return (
        f"{'; '.join(amounts)}: registered but in use by {_holders()}: wait for it with "
        "resources.wait_s=600, lower resources.*, or stop it"
    )


def _holders() -> str:
    """Name the jobs that are running on the cluster beside this one."""
    own = ray.get_runtime_context().get_job_id()
    jobs = []
    for job in ray_state.jobs():
        command = " ".join(job["Entrypoint"].split())
        # The dashboard counts as a job, too.
        if not job["IsDead"] and job["JobID"] != own and "ray/dashboard" not in command:
            jobs.append(f"job {job['JobID']} ({command[:80]}, on {job['DriverIPAddress']})")
    return ", ".join(jobs) or f"this command (job {own})"


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
                f"{wanted:g} {resource} asked for, {have:g} registered on {len(free)} node(s)"
                f"{_listed(nodes)}: lower resources.*, or add nodes with {resource}"
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
                f"left ({largest[short]:g}){_listed(nodes)}: lower resources.*, or add a larger "
                "node"
            )
        for name, amount in bundle.items():
            place[name] = place.get(name, 0) - amount
    return None


def _listed(nodes: Sequence[Bundle]) -> str:
    """Say what each of the first nodes has, by its address: " (10.0.0.1: 8 CPU, 2 GPU; ...)"."""
    named = []
    for node in nodes[:NUM_LISTED]:
        address = next((name for name in node if name.startswith("node:") and name != HEAD), "")
        has = ", ".join(f"{node[name]:g} {name}" for name in ("CPU", "GPU") if node.get(name))
        named.append(f"{address.removeprefix('node:')}: {has or 'nothing'}".removeprefix(": "))
    more = [f"{len(nodes) - NUM_LISTED} more"] if len(nodes) > NUM_LISTED else []
    return f" ({'; '.join([*named, *more])})" if named else ""
