"""All checks in their order, and the command `rayrlhf doctor`.

Every check asks all nodes at once and has a deadline of its own; what a node does not answer in
time is a finding of that node, and the others go on.
"""

import argparse
import json
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from rayrlhf import console, run_dir
from rayrlhf.config import load
from rayrlhf.doctor import checks, facts, findings, gpus, network, selftest
from rayrlhf.doctor.cluster import Answers, Cluster, Node, joined
from rayrlhf.doctor.findings import Finding, fail

if TYPE_CHECKING:
    from rayrlhf.config import Recipe

FACTS_S = 20.0
DISK_S = 30.0
SHARED_S = 20.0
"""For a file to be seen on other nodes, too: NFS looks again after some seconds."""
NETWORK_S = 20.0
COLLECTIVE_S = 60.0
BUILD_S = 60.0
ENGINE_S = 240.0
"""vLLM's import and start on a busy CPU; a node that needs longer has another problem."""
MARGIN_S = 5.0
"""What a process gets to come back with its result."""
SERVE_PORT, DASHBOARD_PORT, RAY_PORT = 8000, 8265, 6379


def main(words: Sequence[str]) -> int:
    """Run `rayrlhf doctor WORDS`; return 0 without a fail, 1 with one. Raises RecipeError."""
    args = _parser().parse_intermixed_args(words)
    recipe = run_dir.settle(load(args.recipe, args.overrides)) if args.recipe else None
    began = time.monotonic()
    found: list[Finding] = []
    with (
        tempfile.NamedTemporaryFile(prefix="rayrlhf-doctor-", suffix=".log") as log,
        console.capture(log.name),
        joined(args.address) as cluster,
    ):
        for some in examine(cluster, recipe, quick=args.quick):
            found += some
            for each in some:
                text = findings.line(each, len(cluster.nodes) + len(cluster.silent))
                console.say(json.dumps(each.record()) if args.json else text)
        num_nodes = len(cluster.nodes)
    seconds = time.monotonic() - began
    counts = findings.counts(found)
    if args.json:
        console.say(json.dumps({"summary": counts, "num_nodes": num_nodes, "seconds": seconds}))
    else:
        more = "" if recipe else "; name a RECIPE to check its run_dir, resources and paths, too"
        numbers = ", ".join(f"{number} {status}" for status, number in counts.items())
        console.say(f"\n{numbers} on {num_nodes} node(s) in {seconds:.0f} s{more}")
    return 1 if counts["fail"] else 0


def examine(cluster: Cluster, recipe: "Recipe | None", *, quick: bool) -> Iterator[list[Finding]]:
    """Yield what every check finds, one check after the other."""
    hosts = cluster.start()
    yield checks.nodes(cluster.names, cluster.dead, cluster.silent)
    if not cluster.nodes:
        return
    skews = cluster.skews(rounds=3, deadline_s=FACTS_S)
    devices = cluster.ask(facts.gpus, deadline_s=FACTS_S + 2 * facts.SMI_S)
    for some in chain(
        [[*checks.clock(skews.values), *_lost("clock", skews.lost)]],
        _software(cluster),
        _machines(cluster, recipe, devices),
        _network(cluster, hosts, devices),
        _processes(cluster, hosts, quick),
        _of_recipe(cluster, recipe) if recipe is not None else (),
    ):
        yield findings.merged(some)


def _software(cluster: Cluster) -> Iterator[list[Finding]]:
    kind = "gpu" if facts.has_cuda_build() else "cpu"
    versions = cluster.ask(facts.versions, deadline_s=FACTS_S)
    found = checks.versions(versions.values, facts.versions(), checks.locked(kind), kind)
    yield [*found, *_lost("versions", versions.lost)]
    code = cluster.ask(facts.code, deadline_s=FACTS_S)
    yield [*checks.code(code.values, facts.code()), *_lost("code", code.lost)]


def _machines(
    cluster: Cluster, recipe: "Recipe | None", devices: Answers[dict[str, str | None]]
) -> Iterator[list[Finding]]:
    memory = cluster.ask(facts.memory, deadline_s=FACTS_S)
    stores = {n.name: n.resources.get("object_store_memory", 0) for n in cluster.nodes}
    yield [*checks.memory(memory.values, stores), *_lost("memory", memory.lost)]

    disk = cluster.ask(facts.disk, deadline_s=DISK_S)
    yield [*checks.disk(disk.values, "Ray's objects and logs"), *_lost("disk", disk.lost)]
    if recipe is not None:
        place = str(recipe.path.absolute())
        disk = cluster.ask(facts.disk, lambda _: (place,), deadline_s=DISK_S)
        yield [*checks.disk(disk.values, "run_dir"), *_lost("disk", disk.lost)]

    registered = {node.name: node.resources.get("GPU", 0) for node in cluster.nodes}
    yield [*gpus.gpus(devices.values, registered), *_lost("gpu", devices.lost)]

    wanted = {node.name: _ports(node, recipe, cluster.is_local) for node in cluster.nodes}
    taken = cluster.ask(facts.ports, lambda node: (list(wanted[node.name]),), deadline_s=FACTS_S)
    answered = {name: wanted[name] for name in taken.values}
    yield [*checks.ports(taken.values, answered), *_lost("ports", taken.lost)]


def _ports(node: Node, recipe: "Recipe | None", is_local: bool) -> dict[int, str]:
    """Return the ports that should be free on a node, or Ray's own, and what for."""
    wanted = {SERVE_PORT: "Serve"}
    if recipe is not None and (recipe.label is not None or recipe.serve is not None):
        wanted = {recipe.label.port: "Serve"} if recipe.label is not None else {}
        if recipe.serve is not None:
            wanted[recipe.serve.port] = "endpoint"
    if node.is_head:
        wanted[DASHBOARD_PORT] = "dashboard"
        if is_local:
            wanted[RAY_PORT] = "Ray"
    return wanted


def _network(
    cluster: Cluster, hosts: Mapping[str, str], devices: Answers[dict[str, str | None]]
) -> Iterator[list[Finding]]:
    num_hosts = len({hosts[name] for name in cluster.names})
    own = {node.name: node.address for node in cluster.nodes}
    places = cluster.ask(network.place, deadline_s=FACTS_S)
    yield [*checks.addresses(places.values, own, num_hosts), *_lost("address", places.lost)]
    if len(cluster.nodes) > 1:
        yield _ring(cluster)
    yield _collective(cluster, "gloo", {node.name: 1 for node in cluster.nodes})
    num_gpus = {
        name: gpus.count(each["smi"]) if each["cuda"] else 0
        for name, each in devices.values.items()
    }
    if any(num_gpus.values()):
        yield _collective(cluster, "nccl", num_gpus)


def _ring(cluster: Cluster) -> list[Finding]:
    """Let every node send to the next, all at the same time, as an all-reduce does."""
    listening = cluster.ask(network.listen, lambda node: (node.address,), deadline_s=NETWORK_S)
    able = [node for node in cluster.nodes if node.name in listening.values]
    after = {node.name: able[(i + 1) % len(able)] for i, node in enumerate(able)}

    def target(node: Node) -> tuple[str, int]:
        other = after[node.name]
        return other.address, listening.values[other.name]

    sent = cluster.ask(network.send, target, deadline_s=NETWORK_S, of=able)
    speeds: dict[tuple[str, str], float | str] = {
        (name, after[name].name): speed for name, speed in (sent.values | sent.lost).items()
    }
    return [*checks.network(speeds), *_lost("network", listening.lost)]


def _collective(cluster: Cluster, backend: str, ranks: Mapping[str, int]) -> list[Finding]:
    """Let so many processes of each node sum numbers together."""
    taking_part = [node for node in cluster.nodes if ranks.get(node.name)]
    master = taking_part[0]
    found = cluster.ask(
        facts.free_port, lambda _: (master.address,), deadline_s=FACTS_S, of=[master]
    )
    if found.lost:
        return _lost("collective", found.lost)
    first: dict[str, int] = {}
    for node in taking_part:
        first[node.name] = sum(ranks[name] for name in first)
    common = {
        "world_size": sum(ranks[node.name] for node in taking_part),
        "master": master.address,
        "port": found.values[master.name],
        "backend": backend,
        "limit_s": COLLECTIVE_S / 2,
    }

    def arguments(node: Node) -> tuple[str, list[dict[str, object]], float]:
        own = [
            common | {"rank": first[node.name] + device, "device": device}
            for device in range(ranks[node.name])
        ]
        return "collective", own, COLLECTIVE_S

    results = cluster.ask(
        selftest.in_process, arguments, deadline_s=COLLECTIVE_S + MARGIN_S, of=taking_part
    )
    return [*checks.collective(results.values, backend), *_lost("collective", results.lost)]


def _processes(cluster: Cluster, hosts: Mapping[str, str], quick: bool) -> Iterator[list[Finding]]:
    """Build and generate on one node of each machine: its nodes share compiler, CPUs and GPUs."""
    firsts = {hosts[node.name]: node for node in reversed(cluster.nodes)}
    apart = [node for node in cluster.nodes if node in firsts.values()]
    built = cluster.ask(
        selftest.in_process,
        lambda _: ("build", [{}], BUILD_S),
        deadline_s=BUILD_S + MARGIN_S,
        of=apart,
    )
    yield [*checks.builds(_firsts(built)), *_lost("build", built.lost)]
    if quick:
        return
    started = cluster.ask(
        selftest.in_process,
        lambda _: ("engine", [{"max_tokens": 4}], ENGINE_S),
        deadline_s=ENGINE_S + MARGIN_S,
        of=apart,
    )
    yield [*checks.engine(_firsts(started)), *_lost("engine", started.lost)]


def _of_recipe(cluster: Cluster, recipe: "Recipe") -> Iterator[list[Finding]]:
    from rayrlhf.doctor.recipe import paths, resources

    yield _run_dir(cluster, str(recipe.path.absolute()))
    yield resources(recipe, [node.resources for node in cluster.nodes])
    named = paths(recipe)
    readable = cluster.ask(facts.unreadable, lambda _: (list(named.values()),), deadline_s=FACTS_S)
    yield [*checks.paths(readable.values, named), *_lost("paths", readable.lost)]


def _run_dir(cluster: Cluster, folder: str) -> list[Finding]:
    """Let every node write a file into the run directory, and look for those of the others."""
    mark = uuid.uuid4().hex
    files = {node.name: f".doctor-{index}-{mark}" for index, node in enumerate(cluster.nodes)}
    written = cluster.ask(
        facts.leave, lambda node: (folder, files[node.name], node.name), deadline_s=SHARED_S
    )
    able = [node for node in cluster.nodes if "made" in written.values.get(node.name, {})]
    contents = {files[node.name]: node.name for node in able}
    seen = cluster.ask(
        facts.see,
        lambda _: (folder, contents, SHARED_S),
        deadline_s=SHARED_S + MARGIN_S,
        of=able,
    )
    made = [each for node in able for each in written.values[node.name]["made"]]
    cluster.ask(
        facts.forget,
        lambda _: (folder, list(contents), sorted(set(made), key=len, reverse=True)),
        deadline_s=SHARED_S,
        of=able,
    )
    missing = {name: [contents[file] for file in lacking] for name, lacking in seen.values.items()}
    found = checks.shared(written.values, missing, folder)
    return [*found, *_lost("run_dir", written.lost), *_lost("run_dir", seen.lost)]


def _lost(check: str, lost: Mapping[str, str]) -> list[Finding]:
    """Return a fail for each node that did not answer."""
    fix = "look at that node: it hangs, or another copy of rayrlhf is there"
    return [fail(check, f"no answer: {why}", fix, name) for name, why in lost.items()]


def _firsts(answers: Answers[list[dict[str, object]]]) -> dict[str, dict[str, object]]:
    return {name: each[0] for name, each in answers.values.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayrlhf doctor",
        description="Check every node of a cluster, or this machine alone, before a run: versions, "
        "code, clocks, disks, memory, network, a collective, GPUs, a build, an engine, ports; with "
        "a recipe also its run_dir, resources and paths. Exit code 0 without a fail, 1 with one.",
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", metavar="key.sub=value", nargs="*", help="change values of the recipe"
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the cluster's head, or auto; without it RAY_ADDRESS, or this machine alone",
    )
    parser.add_argument("--quick", action="store_true", help="do not start an engine")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser
