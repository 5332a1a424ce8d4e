"""The command, on this machine alone, on a cluster of two nodes, and where nobody answers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rayrlhf import cli
from rayrlhf.config import RecipeError
from rayrlhf.doctor import cluster as doctor_cluster
from rayrlhf.doctor import facts
from rayrlhf.doctor.cluster import Answers, Cluster, Node, joined, listed
from rayrlhf.doctor.recipe import paths
from tests import toy
from tests.two_nodes import OPEN, ROOT, LocalCluster, two_nodes

Found = dict[tuple[str, str], list[dict[str, Any]]]


def doctor(*words: str | Path, cwd: Path, timeout_s: float = 300) -> tuple[int, Found, str]:
    """Run the command; return its exit code, what it found by check and node, and stderr."""
    env = {**os.environ, **OPEN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "rayrlhf.cli", "doctor", "--json", "--quick", *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    found: Found = {}
    for record in map(json.loads, done.stdout.splitlines()):
        for node in record.get("nodes") or [""]:
            found.setdefault((record.get("check", "summary"), node), []).append(record)
    return done.returncode, found, done.stderr


def status(found: Found, check: str, node: str = "") -> set[str]:
    return {record["status"] for record in found[check, node]}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster whose worker has another transformers and another copy of the package."""
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(ROOT / "rayrlhf", other / "rayrlhf")
    (other / "rayrlhf" / "rl" / "ppo.py").write_text("changed = True\n")
    wrong = other / "transformers-0.0.1.dist-info"
    wrong.mkdir()
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    with two_nodes(
        (1, 1),
        env={"PYTHONPATH": str(ROOT)},
        worker_env={"PYTHONPATH": str(other)},
        dashboard=False,
        cwd=other,
    ) as made:
        yield made


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_of_which_one_differs(nodes: LocalCluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        recipe = toy.write_recipe(
            tmp_path, label={"labellers": ["ann", "bob"], "items": "no.jsonl", "port": port}
        )
        (tmp_path / "prompts.jsonl").unlink()
        code, found, errors = doctor(
            f"--address={nodes.address}", recipe, "resources.num_workers=64", cwd=tmp_path
        )
    assert code == 1, errors
    for check in ("clock", "memory", "shm", "disk", "address", "run_dir", "code", "versions"):
        for name in ("head", "worker"):
            expected = (
                {"fail"} if name == "worker" and check in ("code", "versions") else {"ok", "warn"}
            )
            assert status(found, check, name) <= expected, found[check, name]
    assert found["versions", "worker"][0]["value"].startswith("transformers 0.0.1, here 5.")
    assert "other" in found["code", "worker"][0]["value"]
    assert status(found, "network") == {"ok"}
    assert found["collective", ""][0]["value"] == "gloo: the sum over 2 ranks is right"
    assert status(found, "gpu") == {"ok"}
    assert status(found, "build", "head") | status(found, "lock") == {"ok"}
    for name in ("head", "worker"):
        assert f"(pid {os.getpid()})" in found["ports", name][0]["value"]
        missing = found["paths", name][0]
        assert missing["status"] == "fail"
        assert "ppo.prompts=" in missing["value"] and "evaluate.prompts=" in missing["value"]
    said = {record["value"].partition(":")[0]: record for record in found["resources", ""]}
    assert said["pretrain"]["status"] == said["sft"]["status"] == "fail"
    assert "32 CPU asked for, 2 registered on 2 node(s)" in said["pretrain"]["value"]
    assert said["corpus"]["status"] == said["ppo"]["status"] == "ok"
    summary = found["summary", ""][0]
    assert summary["num_nodes"] == 2 and summary["summary"]["fail"] > 5
    assert not (tmp_path / "run").exists()  # it leaves nothing behind

    os.killpg(nodes.processes["worker"].pid, signal.SIGKILL)
    code, found, errors = doctor(f"--address={nodes.address}", cwd=tmp_path)
    assert code == 1, errors
    (lost,) = found["nodes", "worker"]
    assert lost["status"] == "fail"
    assert lost["value"].startswith(("died: ", "does not answer: "))
    assert status(found, "versions", "head") == {"ok"}


@pytest.mark.ray
@pytest.mark.slow
def test_this_machine_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is ok or a warning: the machine that runs these tests can run everything."""
    code, found, errors = doctor(cwd=tmp_path)
    assert code == 0, (found, errors)
    assert found["summary", ""][0]["summary"]["fail"] == 0
    checked = {check for check, _ in found}
    assert checked >= {"nodes", "clock", "versions", "code", "memory", "shm", "disk", "gpu"}
    assert checked >= {"ports", "address", "collective", "build"}
    assert "network" not in checked and "run_dir" not in checked


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named_and_a_slow_check_ends(tmp_path: Path) -> None:
    with joined("local") as found:
        found.nodes.append(Node("e" * 56, "gone", "10.9.9.9", False, {}))
        hosts = found.start(deadline_s=30)
        assert list(found.silent) == ["gone"]
        assert list(hosts) == found.names and "gone" not in hosts
        began = time.monotonic()
        slow = found.ask(time.sleep, lambda _: (60,), deadline_s=0.5)
        assert slow.lost == {found.names[0]: "not within 0.5 s"} and slow.values == {}
        broken = found.ask(os.listdir, lambda _: ("/no/such",), deadline_s=10)
        assert "No such file" in broken.lost[found.names[0]]
        # The slow one does not keep the node from others.
        assert found.ask(facts.host, deadline_s=10).values == hosts
        assert time.monotonic() - began < 8
    assert not ray.is_initialized()


class Fake(Cluster):
    """Nodes whose clocks are so many seconds ahead; None does not answer."""

    def __init__(self, **ahead: float | None) -> None:
        super().__init__([Node(name, name, "", False, {}) for name in ahead], {})
        self.ahead = ahead

    def ask(self, function: Any, *_: Any, of: list[Node] | None = None, **__: Any) -> Any:
        assert function is facts.clock and of is not None
        time.sleep(0.01)
        ahead = self.ahead[of[0].name]
        if ahead is None:
            return Answers({}, {of[0].name: "late"})
        return Answers({of[0].name: time.time() - 0.005 + ahead}, {})


def test_the_skew_of_a_clock_is_measured_within_half_a_round_trip() -> None:
    found = Fake(a=0.0, b=-30.0, c=None).skews(rounds=3, deadline_s=5)
    assert found.lost == {"c": "not within 5 s"}
    for name, ahead in (("a", 0.0), ("b", -30.0)):
        skew, unsure = found.values[name]
        assert unsure >= 0.005
        assert skew == pytest.approx(ahead, abs=unsure)


def node_of(name: str, *, alive: bool = True, reason: int = 2, port: int = 1) -> dict[str, Any]:
    return {
        "NodeID": f"{name}{port}",
        "Alive": alive,
        "NodeName": name,
        "NodeManagerAddress": "10.0.0.1",
        "NodeManagerPort": port,
        "Resources": {"CPU": 1.0} if alive else {},
        "DeathReason": reason,
        "DeathReasonMessage": "no heartbeat",
    }


def test_only_nodes_that_are_missed_count_as_dead() -> None:
    table = [
        node_of("a"),
        node_of("b", alive=False),
        node_of("c", alive=False, reason=1),  # ended in an orderly way
        node_of("a", alive=False, port=2),  # came back
        node_of("d", port=3),
        node_of("d", port=4),
    ]
    nodes, dead = listed(table)
    assert [node.name for node in nodes] == ["a", "d:3", "d:4"]
    assert dead == {"b": "no heartbeat"}


def test_an_address_where_nobody_answers_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_cluster, "ANSWER_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:  # which never says a word
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        assert cli.main(["doctor", f"--address={address}"]) == 2
        assert time.monotonic() - began < 8
    said = capsys.readouterr().err
    assert f"--address={address}: no Ray answers there within 3 s: give the address" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://10.0.0.1:10001", "10.0.0.1"])
def test_an_address_of_another_kind_exits_2(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", f"--address={address}"]) == 2
    assert f"--address={address}: " in capsys.readouterr().err


def test_a_wrong_recipe_exits_2_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", str(tmp_path / "no.yaml")]) == 2
    assert "no such recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--adress=x"])
    assert caught.value.code == 2


def test_paths_are_those_that_every_node_reads(tmp_path: Path) -> None:
    from rayrlhf.config import parse

    (tmp_path / "corpus").mkdir()
    found = paths(
        parse(
            {
                "name": "x",
                "run_dir": str(tmp_path / "run"),
                "model": {"path": "acme/tiny"},
                "tokenizer": {"path": str(tmp_path / "tokenizer")},
                "sft": {"train": f"{tmp_path}/data/*/demos-*.jsonl"},
                "ppo": {
                    "prompts": "s3://bucket/prompts.jsonl",
                    "init": f"{tmp_path}/run/sft/final",
                },
                "reward": {"train": "builtin:human-ratings/comparisons.train.jsonl"},
            }
        )
    )
    assert found == {
        "tokenizer.path": str(tmp_path / "tokenizer"),
        "sft.train": str(tmp_path / "data"),
        "reward.demonstrations": str(tmp_path / "data"),
    }


def test_joining_names_the_machine_when_ray_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: the cluster was started with Ray 2.59.0")

    monkeypatch.setattr(doctor_cluster, "_answering", lambda place: place)
    monkeypatch.setattr(doctor_cluster.ray, "init", refuse)
    said = r"10\.0\.0\.1:6379: .*Version mismatch.*run doctor on a node"
    with pytest.raises(RecipeError, match=said), joined("10.0.0.1:6379"):
        pass
