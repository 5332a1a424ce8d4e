"""`rayrlhf label` itself, on Ray Serve: killed and started again, and closed with Ctrl-C."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from rayrlhf.data.records import read_records
from tests import toy
from tests.serving.people import SECRET, items

PEOPLE = [f"person {i}" for i in range(20)]
NUM_JUDGEMENTS = 200


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_recipe(folder: Path, port: int, **label: Any) -> Path:
    path = folder / "toy.yaml"
    section = {"labellers": PEOPLE, "port": port, **label}
    tree = {"name": "toy", "run_dir": str(folder / "run"), "label": section}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


class Command:
    """`rayrlhf label` in a process of its own."""

    def __init__(self, recipe: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            toy.command("label", recipe),
            env={**toy.environment(), "RAYRLHF_LABEL_SECRET": SECRET},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if "Ctrl-C" in line:
                return
        raise AssertionError(self.said)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """Kill the command and everything that it started, as a machine that goes down does."""
        for process in [*self.children(), psutil.Process(self.process.pid)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(60)

    def kill_replica(self) -> None:
        """Kill the one process that serves the page."""
        found = [p for p in self.children() if "LabelPage" in " ".join(p.cmdline())]
        assert len(found) == 1, [p.cmdline() for p in self.children()]
        found[0].kill()

    def close(self) -> str:
        self.process.send_signal(signal.SIGINT)
        rest, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, self.said + rest
        return self.said + rest


def patiently(send: Callable[[], httpx.Response], until: float) -> httpx.Response:
    """Send as the page does: again and again, until the server has answered."""
    while True:
        try:
            answer = send()
            # Serve's proxy answers in plain text while the page is not there yet.
            if answer.status_code < 500 and "json" in answer.headers["content-type"]:
                return answer
        except httpx.TransportError:
            pass  # the server is down, which is what this test is about
        assert time.monotonic() < until, "the server does not come back"
        time.sleep(0.1)


class Person(threading.Thread):
    """Ranks what comes until nothing is left; acknowledged judgements are in `acknowledged`."""

    def __init__(self, url: str, name: str, gate: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self._url, self.labeller, self._gate = url, name, gate
        self.acknowledged: list[str] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._work(time.monotonic() + 240)
        except Exception as error:
            self.error = error

    def _work(self, until: float) -> None:
        with httpx.Client(base_url=self._url, timeout=5) as client:
            body = {"name": self.labeller, "secret": SECRET}
            patiently(lambda: client.post("/api/session", json=body), until)
            while True:
                found = patiently(lambda: client.get("/api/items/next"), until).json()["item"]
                if found is None:
                    return
                self._gate.acquire()
                said = {
                    "key": f"{self.labeller.replace(' ', '-')}-{found['id']}",
                    "item": found["id"],
                    "tiers": [[k] for k in range(6)],
                }
                for _ in range(2):  # every judgement is sent twice
                    send = lambda said=said: client.post("/api/judgements", json=said)  # noqa: E731
                    answer = patiently(send, until)
                    assert answer.status_code == 200, answer.text
                self.acknowledged.append(found["id"])


@pytest.mark.ray
@pytest.mark.slow
def test_two_hundred_judgements_with_kills_halfway(tmp_path: Path) -> None:
    """20 people, 200 judgements; the replica is killed after 60, everything after 120."""
    file, port = tmp_path / "items.jsonl", free_port()
    file.write_text("".join(json.dumps(item) + "\n" for item in items(NUM_JUDGEMENTS)))
    recipe = write_recipe(tmp_path, port, items=str(file), overlap=0, claim_s=1)
    server = Command(recipe, port)
    assert f"http://127.0.0.1:{port}/" in server.said and SECRET not in server.said
    gate = threading.Semaphore(60)
    people = [Person(server.url, name, gate) for name in PEOPLE]

    def wait(count: int) -> None:
        end = time.monotonic() + 120
        while sum(len(person.acknowledged) for person in people) < count:
            assert time.monotonic() < end and not any(p.error for p in people), people[0].error
            time.sleep(0.05)

    try:
        for person in people:
            person.start()
        wait(55)
        server.kill_replica()
        gate.release(60)
        wait(110)
        server.kill()
        gate.release(1000)
        server = Command(recipe, port)
        for person in people:
            person.join(240)
        assert [person.error for person in people if person.error] == []
        said = server.close()
    finally:
        server.kill() if server.process.poll() is None else None
    folder = tmp_path / "run" / "label"
    records = read_records(folder / "comparisons.jsonl", "comparison")
    counted = Counter(
        (name, record["prompt"]) for record in records for name in record["labellers"]
    )
    acknowledged = sum(len(person.acknowledged) for person in people)
    assert len(records) == NUM_JUDGEMENTS and sum(counted.values()) == acknowledged
    assert set(counted.values()) == {1} and acknowledged >= NUM_JUDGEMENTS
    assert "200 comparisons in" in said


@pytest.mark.ray
@pytest.mark.slow
def test_the_arena_asks_real_models(tmp_path: Path, tiny_model: Path) -> None:
    port = free_port()
    arena = {
        "models": {"one": str(tiny_model), "two": str(tiny_model)},
        "max_response_tokens": 8,
        "memory_gib": 0.02,
    }
    recipe = write_recipe(tmp_path, port, arena=arena)
    tree = yaml.safe_load(recipe.read_text())
    tree["model"] = {"max_length": 48}
    recipe.write_text(yaml.safe_dump(tree))
    server = Command(recipe, port)
    try:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            body: dict[str, Any] = {"name": PEOPLE[0], "secret": SECRET}
            assert client.post("/api/session", json=body).status_code == 200
            body = {"key": "k" * 16, "prompt": "The movie"}
            asked = functools.partial(client.post, "/api/battles", json=body)
            answer = patiently(asked, time.monotonic() + 300)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["battle"]["responses"]) == 2
            long = {"key": "l" * 16, "prompt": "The movie is long. " * 40}
            refused = client.post("/api/battles", json=long)
            assert refused.status_code == 422 and "40 fit" in refused.text
            vote = {"key": "v" * 16, "vote": "tie"}
            voted = client.post(f"/api/battles/{'k' * 16}/vote", json=vote).json()
            assert sorted(voted["models"]) == ["one", "two"]
        said = server.close()
    finally:
        server.kill() if server.process.poll() is None else None
    assert re.search(r"1 comparisons in .*arena\.comparisons\.jsonl", said)
    file = tmp_path / "run" / "label" / "arena.comparisons.jsonl"
    assert read_records(file, "comparison")[0]["ranks"] == [1, 1]


def test_what_is_wrong_is_said_before_ray_starts(tmp_path: Path, tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        recipe = write_recipe(tmp_path, taken.getsockname()[1], items=str(tmp_path / "none.jsonl"))
        lacking = toy.run("label", recipe, "label=null", "model.path=somewhere")
    assert lacking.returncode == 2 and "no section label" in lacking.stderr
    far = toy.run("label", recipe, f"label.port={free_port()}", "label.host=203.0.113.1")
    assert far.returncode == 2 and "cannot listen there" in far.stderr, far.stderr
    arena = {
        "models": {"a": str(tiny_model), "b": str(tiny_model)},
        "prompt_format": "chat",
        "max_response_tokens": 8,
    }
    bare = toy.run("label", recipe, f"label.port={free_port()}", f"label.arena={json.dumps(arena)}")
    assert bare.returncode == 2 and "has no chat template" in bare.stderr, bare.stderr
    missing = toy.run("label", recipe, f"label.port={free_port()}")
    assert missing.returncode == 2 and "no such file" in missing.stderr, missing.stderr
    assert os.listdir(tmp_path / "run" / "label")
