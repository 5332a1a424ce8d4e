"""The nodes of a cluster, and one process on each that measures what it is asked for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions
from ray._private.services import canonicalize_bootstrap_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrlhf.config import RecipeError
from rayrlhf.doctor import facts
from rayrlhf.session import HEAD

T = TypeVar("T")
Handle = Any
"""A Ray actor handle, whose methods exist at run time only."""
ANSWER_S = 10.0
"""For a cluster to answer at its address."""
START_S = 30.0
"""For a process to start on every node."""
ASK = (
    "import sys, ray\n"
    "print(len(ray._raylet.GcsClient(address=sys.argv[1]).get_all_node_info(timeout=8)))"
)
EXPECTED_ENDS = (1, 4)
"""Ray's codes for a node that was ended as it should be, or that an autoscaler did not need."""


@dataclass(frozen=True)
class Node:
    """A node that is alive, as Ray knows it."""

    id: str
    name: str
    """The one it was given, or its address; with a port where another has the same."""
    address: str
    is_head: bool
    resources: Mapping[str, float] = field(hash=False)


class Remote:
    """A process on a node; several calls run at the same time."""

    def call(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """Call a function there."""
        return function(*arguments)


@dataclass
class Answers(Generic[T]):
    """What the nodes answered, by name, and why others did not."""

    values: dict[str, T]
    lost: dict[str, str]


class Cluster:
    """The nodes that are alive, and their processes."""

    def __init__(self, nodes: list[Node], dead: dict[str, str], *, is_local: bool = False) -> None:
        """`is_local`: started by this command, on this machine alone."""
        self.nodes, self.dead, self.is_local = nodes, dead, is_local
        self.silent: dict[str, str] = {}
        self._remotes: dict[str, Handle] = {}

    @property
    def names(self) -> list[str]:
        """Names of the nodes that answer."""
        return [node.name for node in self.nodes]

    def start(self, deadline_s: float = START_S) -> dict[str, str]:
        """Start the processes; return the host of each node. Who does not answer is set aside."""
        for node in self.nodes:
            strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
            remote = ray.remote(Remote).options(
                num_cpus=0, max_concurrency=32, scheduling_strategy=strategy
            )
            self._remotes[node.name] = remote.remote()
        found = self.ask(facts.host, deadline_s=deadline_s)
        self.silent = found.lost
        self.nodes = [node for node in self.nodes if node.name not in found.lost]
        return found.values

    def ask(
        self,
        function: Callable[..., T],
        arguments: Callable[[Node], tuple[Any, ...]] = lambda _: (),
        *,
        deadline_s: float,
        of: list[Node] | None = None,
    ) -> Answers[T]:
        """Call `function` on every node (or those of `of`) at once, and wait for the answers."""
        ends = time.monotonic() + deadline_s
        nodes = self.nodes if of is None else of
        refs = {
            self._remotes[node.name].call.remote(function, arguments(node)): node.name
            for node in nodes
        }
        ready, late = ray.wait(
            list(refs), num_returns=len(refs), timeout=max(ends - time.monotonic(), 0)
        )
        found: Answers[T] = Answers({}, {refs[ref]: f"not within {deadline_s:g} s" for ref in late})
        for ref in ready:
            try:
                found.values[refs[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                found.lost[refs[ref]] = _last_line(error)
        found.values = {n.name: found.values[n.name] for n in nodes if n.name in found.values}
        return found

    def skews(self, *, rounds: int, deadline_s: float) -> Answers[tuple[float, float]]:
        """Return how far each clock is ahead of this one, and how sure that is, seconds.

        Half a round trip lies between question and answer; the shortest of some is taken.
        """
        with ThreadPoolExecutor(min(len(self.nodes), 32)) as pool:
            ends = time.monotonic() + deadline_s
            found = list(pool.map(lambda node: self._skew(node, rounds, ends), self.nodes))
        values = {n.name: skew for n, skew in zip(self.nodes, found, strict=True) if skew}
        late = f"not within {deadline_s:g} s"
        return Answers(values, {name: late for name in self.names if name not in values})

    def _skew(self, node: Node, rounds: int, ends: float) -> tuple[float, float] | None:
        measured = []
        for _ in range(rounds):
            asked, began = time.time(), time.monotonic()
            answer = self.ask(facts.clock, deadline_s=max(ends - began, 0), of=[node])
            half = (time.monotonic() - began) / 2
            if node.name not in answer.values:
                return None
            measured.append((answer.values[node.name] - (asked + half), half))
        return min(measured, key=lambda each: each[1])

    def close(self) -> None:
        """End the processes, whatever they hang in."""
        for remote in self._remotes.values():
            ray.kill(remote)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


@contextmanager
def joined(address: str | None) -> Iterator[Cluster]:
    """Join the cluster at `address`, $RAY_ADDRESS, or start one on this machine alone.

    Raises RecipeError when nobody answers there within ANSWER_S.
    """
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    gcs = None if place == "local" else _answering(place)
    options = {"include_dashboard": False} if gcs is None else {}
    try:
        ray.init(
            address=gcs or "local",
            log_to_driver=False,
            logging_level="error",
            namespace="rayrlhf-doctor",
            **options,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RecipeError(
            f"--address={place}: this machine cannot join ({_last_line(error)}): run doctor on a "
            "node of the cluster, or there through ray job submit -- python jobs/doctor.py"
        ) from None
    cluster = Cluster(*listed(ray.nodes()), is_local=gcs is None)
    try:
        yield cluster
    finally:
        cluster.close()
        ray.shutdown()


def _answering(place: str) -> str:
    """Return host:port of the cluster's head, once it has answered."""
    if "://" in place:
        raise RecipeError(
            f"--address={place}: give host:port of the head, as `ray start --head` prints it, or "
            "auto on a node; a dashboard takes ray job submit -- python jobs/doctor.py"
        )
    try:
        gcs = canonicalize_bootstrap_address(place)
    except (ConnectionError, ValueError) as error:
        raise RecipeError(
            f"--address={place}: {_last_line(error)}: give host:port of the head, for example "
            "10.0.0.1:6379"
        ) from None
    if gcs is None:
        raise RecipeError(
            f"--address={place}: no Ray runs here: ray start --head, or give host:port"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, gcs],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        said = f"no Ray answers there within {ANSWER_S:g} s"
    else:
        if done.returncode == 0:
            return gcs
        said = " ".join(done.stderr.splitlines()[-1:])[:200] or "no Ray answers there"
    raise RecipeError(
        f"--address={place}: {said}: give the address that `ray start --head` printed, open its "
        "port, or set RAY_AUTH_TOKEN where the cluster asks for one"
    )


def listed(table: list[dict[str, Any]]) -> tuple[list[Node], dict[str, str]]:
    """Return the nodes of `ray.nodes()` that are alive, the head first, and why others are not.

    One that was ended in an orderly way, or whose name a living one has, is not missed.
    """
    alive = [each for each in table if each["Alive"]]
    names = [_name(each, alive) for each in alive]
    nodes = [
        Node(
            id=each["NodeID"],
            name=name,
            address=each["NodeManagerAddress"],
            is_head=HEAD in each["Resources"],
            resources=each["Resources"],
        )
        for name, each in zip(names, alive, strict=True)
    ]
    dead = {
        _name(each, table): each["DeathReasonMessage"] or "for no reason that Ray knows"
        for each in table
        if not each["Alive"]
        and each["DeathReason"] not in EXPECTED_ENDS
        and each["NodeName"] not in [other["NodeName"] for other in alive]
    }
    return sorted(nodes, key=lambda node: (not node.is_head, node.name)), dead


def _name(node: Mapping[str, Any], others: list[dict[str, Any]]) -> str:
    name = str(node["NodeName"])
    alike = [each for each in others if each["NodeName"] == name]
    return f"{name}:{node['NodeManagerPort']}" if len(alike) > 1 else name
