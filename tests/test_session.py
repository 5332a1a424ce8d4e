"""What is missing on a cluster, or in use there, is named before any actor starts."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rayrlhf import session
from rayrlhf.config import RecipeError
from rayrlhf.session import in_use, shortage

SMALL = {"CPU": 2.0, "memory": 1e9}
GPUS = {"CPU": 16.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("bundles", "nodes", "says"),
    [
        ([{"CPU": 1.0}] * 2, [SMALL], None),
        ([{"CPU": 0.25, "GPU": 0.0}] * 5, [SMALL], None),
        ([{"CPU": 1.0}] * 3, [SMALL], "3 CPU asked for, 2 registered on 1 node"),
        ([{"CPU": 1.0, "GPU": 1.0}], [SMALL], "1 GPU asked for, 0 registered"),
        ([{"GPU": 1.0}] * 16, [GPUS, GPUS], None),
        ([{"GPU": 1.0}] * 17, [GPUS, GPUS], "17 GPU asked for, 16 registered on 2 node"),
        ([{"CPU": 3.0}], [SMALL, SMALL], "no node has that much CPU left"),
        ([{"GPU": 5.0}, {"GPU": 5.0}, {"GPU": 5.0}], [GPUS, GPUS], "asks for 5 GPU on one node"),
        ([{"GPU": 3.0, "CPU": 1.0}] * 4, [GPUS, GPUS], None),
    ],
)
def test_shortage(
    bundles: list[dict[str, float]], nodes: list[dict[str, float]], says: str | None
) -> None:
    found = shortage(bundles, nodes)
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert says in found
        assert "lower resources" in found


def test_a_shortage_says_what_each_node_has() -> None:
    nodes = [
        {"CPU": 8.0, "GPU": 2.0, "node:10.0.0.1": 1.0, "node:__internal_head__": 1.0},
        {"memory": 1e9, "node:10.0.0.2": 1.0},
    ]
    assert (
        "3 GPU asked for, 2 registered on 2 node(s) (10.0.0.1: 8 CPU, 2 GPU; 10.0.0.2: nothing)"
        in (shortage([{"GPU": 1.0}] * 3, nodes) or "")
    )
    assert "(4 CPU; 4 CPU)" in (shortage([{"CPU": 6.0}], [{"CPU": 4.0}] * 2) or "")
    assert "; 4 CPU; 4 more)" in (shortage([{"CPU": 6.0}], [{"CPU": 4.0}] * 12) or "")


def test_shortage_does_not_touch_the_nodes() -> None:
    nodes = [dict(GPUS)]
    shortage([{"GPU": 2.0}], nodes)
    assert nodes == [GPUS]


@pytest.mark.parametrize(
    ("bundles", "free", "says"),
    [
        ([{"CPU": 1.0, "GPU": 0.0}] * 2, [{"CPU": 2.0}], None),
        (
            [{"CPU": 1.0, "GPU": 0.0}] * 2,
            [{"CPU": 1.0}],
            "2 CPU asked for, 1 of 4 free: registered",
        ),
        ([{"CPU": 1.0}], [{}], "1 CPU asked for, 0 of 4 free"),
        # Enough in all, but on no single node.
        ([{"CPU": 2.0}], [{"CPU": 1.0}, {"CPU": 1.0}], "2 CPU asked for, 2 of 8 free"),
    ],
)
def test_in_use(
    monkeypatch: pytest.MonkeyPatch,
    bundles: list[dict[str, float]],
    free: list[dict[str, float]],
    says: str | None,
) -> None:
    monkeypatch.setattr(session, "_holders", lambda: "job 02 (train.py, on 10.0.0.1)")
    found = in_use(bundles, [{"CPU": 4.0}] * len(free), free)
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert says in found
        assert "in use by job 02 (train.py, on 10.0.0.1): wait for it" in found


HOLDER = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
from ray.util.placement_group import placement_group
group = placement_group([{"CPU": 1.0}] * 2)
ray.get(group.ready())
print("holds", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def busy() -> Iterator[Any]:
    """Return a function: seconds -> another job that holds 2 of 3 CPUs of a cluster for so long."""
    context = ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    others: list[subprocess.Popen[str]] = []

    def hold(seconds: float) -> subprocess.Popen[str]:
        other = subprocess.Popen(
            [sys.executable, "-c", HOLDER, context.address_info["address"], str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        others.append(other)
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        return other

    yield hold
    for other in others:
        other.kill()
        other.wait()
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_what_another_job_holds_is_waited_for_and_then_named(
    busy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [{"CPU": 1.0, "GPU": 0.0}] * 2
    monkeypatch.setattr(session, "RELEASE_S", 1.0)
    session.require(bundles, stage="sft")
    with pytest.raises(RecipeError, match="1 GPU asked for, 0 registered"):
        session.require([{"GPU": 1.0}], wait_s=1, stage="sft")  # no autoscaler hears it
    busy(600)
    with pytest.raises(RecipeError) as caught:
        session.require(bundles, stage="sft")
    said = str(caught.value)
    assert said.startswith("sft: 2 CPU asked for, 1 of 3 free: registered but in use by job ")
    assert f"({sys.executable} -c " in said and "resources.wait_s=600" in said
    assert "ray/dashboard" not in said
    assert len(said.splitlines()) == 1
    session.require(bundles[:1], stage="sft")


@pytest.mark.ray
@pytest.mark.slow
def test_it_goes_on_when_the_other_job_ends(busy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    other = busy(5)
    started = time.monotonic()
    session.require([{"CPU": 2.0}], wait_s=120, stage="ppo")
    assert other.poll() is not None or time.monotonic() - started > 2
    assert "ppo: waiting for the cluster, 120 s left: 2 CPU asked for" in capsys.readouterr().out


CONNECTED = """
import time
from types import SimpleNamespace
import psutil
import ray
from rayrlhf import session
session.connect(SimpleNamespace(name="quiet"), keeps_idle=False)
ray.get(ray.remote(lambda: 1).remote())
end = time.monotonic() + 60
while True:
    named = []
    for each in psutil.Process().children(recursive=True):
        try:
            named.append(" ".join(each.cmdline()))
        except psutil.Error:
            continue  # it ends just now
    if not any("ray::IDLE" in name for name in named):
        break
    assert time.monotonic() < end, named
    time.sleep(0.2)
assert any("raylet" in name for name in named)
assert not any("log_monitor" in name for name in named), named
assert ray.get(ray.remote(lambda: 2).remote()) == 2
print("quiet")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_its_own_runs_nothing_that_nobody_asks_for() -> None:
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTED], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "quiet\n", done.stdout + done.stderr


VISIBLE = """
import os
from types import SimpleNamespace
import ray
from ray.cluster_utils import Cluster
from rayrlhf import session
head = {"num_cpus": 1, "num_gpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args=head)
os.environ["RAY_ADDRESS"] = cluster.address
session.connect(SimpleNamespace(name="visible"))
visible = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
print([ray.get(visible.options(num_gpus=num).remote()) for num in (0, 2)])
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_without_gpus_sees_none() -> None:
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", VISIBLE],
        env={**env, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["['', '0,1']"], done.stdout + done.stderr


@pytest.mark.parametrize("comes", [True, False])
def test_an_autoscaler_is_asked_once_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """Nobody else asks: the actors that would wait for a node come after this check."""
    asked: list[list[dict[str, float]]] = []
    here = [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0}}]

    def nodes() -> list[dict[str, Any]]:
        gpus = {"CPU": 16.0, "GPU": 8.0}
        return [*here, *([{**here[0], "NodeID": "b", "Resources": gpus}] * (comes and bool(asked)))]

    free = {"a": {"CPU": 4.0}, "b": {"CPU": 16.0, "GPU": 8.0}}
    monkeypatch.setattr(session.ray, "nodes", nodes)
    monkeypatch.setattr(session.ray_state, "available_resources_per_node", lambda: free)
    monkeypatch.setattr(session, "request_resources", lambda bundles: asked.append(bundles))
    bundles = [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 0.0}]
    if comes:
        session.require(bundles, wait_s=60, stage="ppo")
    else:
        with pytest.raises(RecipeError, match="1 GPU asked for, 0 registered"):
            session.require(bundles, wait_s=1.2, stage="ppo")
    assert asked == [[{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}], []]


def test_an_autoscaler_is_asked_for_what_others_use_besides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray takes a request for all that there is to be; another job's request makes it forget."""
    asked: list[list[dict[str, float]]] = []
    nodes = [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 8.0}}]
    monkeypatch.setattr(session.ray, "nodes", lambda: nodes)
    free = {"a": {"CPU": 3.0, "GPU": 2.0}}
    monkeypatch.setattr(session.ray_state, "available_resources_per_node", lambda: free)
    monkeypatch.setattr(session, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(session, "_holders", lambda: "others")
    monkeypatch.setattr(session, "RELEASE_S", 0.0)
    monkeypatch.setattr(session, "LINE_EVERY_S", 0.3)
    with pytest.raises(RecipeError, match=r"4 GPU asked for, 2 of 8 free"):
        session.require([{"GPU": 4.0}], wait_s=1.2, stage="ppo")
    assert len(asked) >= 3 and asked[-1] == []
    assert all(each == [{"GPU": 4.0}, {"CPU": 1.0, "GPU": 6.0}] for each in asked[:-1])


def test_no_autoscaler_is_asked_without_time_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(session.ray, "nodes", list)
    monkeypatch.setattr(session, "request_resources", lambda bundles: asked.append(bundles))
    with pytest.raises(RecipeError, match="1 CPU asked for, 0 registered"):
        session.require([{"CPU": 1.0}], stage="sft")
    assert asked == []
