"""Two `ray start` on this machine, joined to a cluster, and `ray job submit` to it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import toy

ROOT = Path(__file__).parents[1]
BIN = Path(toy.command()[0]).parent
# Ray asks for a token by default; a cluster of one test, on this machine alone, has none.
OPEN = {"RAY_AUTH_MODE": "disabled"}
NAMES = ("head", "worker")
BOTH = """
import sys, time, ray
num, ends = 0, time.monotonic() + float(sys.argv[2])
while num < 2:
    assert time.monotonic() < ends, f"{num} nodes"
    try:
        num = len(ray._raylet.GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10))
    except ray.exceptions.RpcError as error:
        print(error, file=sys.stderr)  # on a busy machine its port is open before it answers
    time.sleep(0.2)
"""


@dataclass(frozen=True)
class Submitted:
    """A job that has ended, as a person and as a program see it."""

    code: int
    """Exit code of `ray job submit`."""
    output: str
    """What it printed: log lines of the job, and how it ended."""
    info: dict[str, Any]
    """What the cluster says: status, message, driver_exit_code."""


class LocalCluster:
    """The two nodes that run, and what one can ask them."""

    def __init__(self, address: str, dashboard: str, env: dict[str, str]) -> None:
        self.address, self.dashboard, self.env = address, dashboard, env
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def ask(self, path: str) -> Any:
        """Return what the dashboard answers."""
        with urllib.request.urlopen(f"{self.dashboard}{path}", timeout=20) as answer:
            return json.load(answer)

    def ray(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's against this cluster."""
        return subprocess.run(
            [BIN / "ray", *words],
            env=self.env | {"RAY_ADDRESS": self.dashboard},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, name: str, *words: str | Path, wait: bool = True) -> Submitted:
        """Submit `python jobs/NAME.py WORDS`, as the README does."""
        number = len(self.ask("/api/jobs/"))
        job = f"{name}-{number}"
        options = ["--working-dir", str(ROOT), "--submission-id", job] + ["--no-wait"] * (not wait)
        python = toy.command()[0]
        entry = [python, f"jobs/{name}.py", *map(str, words)]
        done = self.ray("job", "submit", *options, "--", *entry)
        info = self.ask(f"/api/jobs/{job}")
        return Submitted(done.returncode, done.stdout + done.stderr, info)

    def status(self, job: str) -> str:
        """Return the status of a job."""
        return str(self.ask(f"/api/jobs/{job}")["status"])

    def nodes_of_actors(self, job: str, kind: str) -> list[str]:
        """Return the name of the node of each actor of a class that a job has or had."""
        driver = self.ask(f"/api/jobs/{job}")["job_id"]
        chosen = f"filter_keys=job_id&filter_predicates=%3D&filter_values={driver}"
        actors = self.ask(f"/api/v0/actors?limit=1000&{chosen}")["data"]["result"]["result"]
        nodes = self.ask("/api/v0/nodes?limit=100")["data"]["result"]["result"]
        names = {node["node_id"]: node["node_name"] for node in nodes}
        return [names[each["node_id"]] for each in actors if kind in each["class_name"]]


def free_ports(num: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextmanager
def two_nodes(
    cpus: tuple[float, float],
    *,
    env: Mapping[str, str] | None = None,
    worker_env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    dashboard: bool = True,
    cwd: Path | None = None,
) -> Iterator[LocalCluster]:
    """Start a head and a worker with so many CPUs each; end both with the block.

    `worker_env` is the environment of the worker node alone.
    """
    port, http, *agents = free_ports(6)
    common = {**os.environ, **OPEN, **(env or {})}
    common.pop("RAY_ADDRESS", None)
    cluster = LocalCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{http}", common)
    # A folder each: in one, each node would remove files of jobs that the other needs. Short names,
    # for a socket's path has at most 107 letters.
    temps = {name: Path("/tmp") / f"ray-{os.getpid()}-{port}-{name[0]}" for name in NAMES}
    try:
        for index, (name, num_cpus) in enumerate(zip(NAMES, cpus, strict=True)):
            place = (
                ["--head", f"--port={port}", f"--dashboard-port={http}"]
                + [f"--include-dashboard={str(dashboard).lower()}"]
                if name == "head"
                else [f"--address=127.0.0.1:{port}"]
            )
            words = [
                *("start", *place, "--block", f"--num-cpus={num_cpus:g}", f"--node-name={name}"),
                f"--temp-dir={temps[name]}",
                f"--dashboard-agent-listen-port={agents[2 * index]}",
                f"--metrics-export-port={agents[2 * index + 1]}",
                *("--object-store-memory=200000000", "--disable-usage-stats", *options),
            ]
            own = common | dict(worker_env or {}) if name == "worker" else common
            cluster.processes[name] = _start(words, own, cwd)
            _wait_until_up(port, cluster.processes[name])
        _wait_for_nodes(cluster, takes_jobs=dashboard)
        yield cluster
    finally:
        for process in reversed(cluster.processes.values()):
            _end(process)
        for temp in temps.values():
            shutil.rmtree(temp, ignore_errors=True)


def _start(words: list[str], env: dict[str, str], cwd: Path | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [BIN / "ray", *words],
        env=env,
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_until_up(port: int, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        assert process.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, f"no Ray on port {port}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)


def _wait_for_nodes(cluster: LocalCluster, *, takes_jobs: bool, timeout_s: float = 120) -> None:
    """Return when both nodes are there and the head takes jobs: a cluster answers before."""
    joined = subprocess.run(
        [sys.executable, "-c", BOTH, cluster.address, str(timeout_s)], env=cluster.env, check=False
    )
    assert joined.returncode == 0, "the cluster of two nodes is not up"
    deadline = time.monotonic() + timeout_s
    while takes_jobs:
        with contextlib.suppress(OSError, ValueError):
            if cluster.ask("/api/jobs/") == []:
                return
        assert time.monotonic() < deadline, "the cluster takes no jobs"
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
