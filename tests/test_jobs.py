"""Every file of jobs/, submitted to a cluster of two nodes as the README says."""

import contextlib
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.metrics import read_jsonl
from tests import toy
from tests.two_nodes import NAMES, ROOT, LocalCluster, Submitted, free_ports, two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STAGES = ("corpus", "pretrain", "sft", "reward", "dpo", "ppo", "rounds", "evaluate")
OTHERS = ("data", "doctor", "label", "pipeline", "plan", "scaling_law", "serve")
PRETRAINING_STEPS = 300
ON_BOTH = ("resources.num_workers=2", "resources.cpus_per_worker=1")
"""A worker takes all of a node: two of them are on two."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two nodes of one CPU each: what takes more is on both."""
    with two_nodes((1, 1)) as made:
        yield made


@pytest.fixture(scope="module")
def serve_port() -> int:
    """A port for Ray Serve, which a cluster has one of, and keeps when an application ends."""
    return free_ports(1)[0]


def succeeded(done: Submitted) -> Submitted:
    assert (done.code, done.info["status"], done.info["driver_exit_code"]) == (
        0,
        "SUCCEEDED",
        0,
    ), done.output
    return done


def until(condition: Any, what: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def short_recipe(folder: Path) -> Path:
    """Write the toy recipe with as few steps as show that a stage works."""
    toy.write_records(folder)
    tree = toy.recipe(folder)
    steps = {"epochs": 100, "max_steps": PRETRAINING_STEPS, "save_every": 10}
    tree["pretrain"] |= {**steps, "num_samples": 0}
    for stage in ("sft", "reward", "dpo"):
        tree[stage] |= {"max_steps": 3}
    tree["ppo"] |= {"steps": 1, "ptx_coef": 0.0}
    tree["rounds"] = {"num_rounds": 1, "judge": "vader", "num_prompts": 8}
    tree["evaluate"] |= {"num_prompts": 4}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_every_job_is_tested_here() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {*STAGES, *OTHERS}


def test_a_pipeline_on_a_cluster_makes_the_bytes_of_one_machine(
    cluster: LocalCluster, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """The stages that read what the cluster makes of the corpus and of SFT are unchanged."""
    recipe, run = finished[0], tmp_path / "run"
    toy.copy_without(recipe.parent / "run", run, "corpus", "sft")
    shutil.rmtree(run / "tokenizer")
    done = succeeded(cluster.submit("pipeline", recipe, f"run_dir={run}"))
    for stage in ("pretrain", "reward", "dpo", "ppo", "evaluate"):
        assert f"{stage:>9} unchanged, nothing to do" in done.output
    for stage in ("corpus", "sft"):
        assert f"{stage:>9} done in" in done.output
    # Of the finished run, too: the smallest job there is.
    said = succeeded(cluster.submit("doctor", recipe, f"run_dir={run}", "--quick")).output
    assert "ok    nodes       2 alive: head, worker" in said
    assert "gloo: the sum over 2 ranks is right" in said
    assert f"all 2 nodes: {run} is written and read" in said


def test_every_stage_is_a_job(cluster: LocalCluster, tmp_path: Path) -> None:
    """One after the other, in one run directory; pretraining is stopped in the middle."""
    recipe, run = short_recipe(tmp_path), tmp_path / "run"
    assert "6 data files are valid" in succeeded(cluster.submit("data", recipe)).output
    begun: dict[str, Any] = {}
    for stage in STAGES:
        if stage == "pretrain":
            begun = stopped_pretraining(cluster, recipe, run)
        overrides = ON_BOTH if stage == "sft" else ()
        done = succeeded(cluster.submit(stage, recipe, *overrides))
        assert f"{stage:>9} done in" in done.output, done.output
        job = done.info["submission_id"]
        if stage == "sft":
            assert sorted(cluster.nodes_of_actors(job, "RayTrainWorker")) == sorted(NAMES)
        if stage == "ppo":
            roles = ("Actor", "Critic", "Reference", "Reward", "Rollout")
            nodes = [cluster.nodes_of_actors(job, f"{role}Worker") for role in roles]
            assert [len(each) for each in nodes] == [1] * 5
            assert {name for each in nodes for name in each} == set(NAMES)
    records = read_jsonl(run / "pretrain" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, PRETRAINING_STEPS + 1))
    assert records[0] == begun  # it went on, it did not begin again
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert {"base", "sft", "dpo", "ppo"} <= set(results["distinct_2"])
    assert "round-1" in results["battles"]["models"]
    done = succeeded(cluster.submit("pipeline", recipe))
    assert done.output.count("unchanged, nothing to do") == len(STAGES)


def stopped_pretraining(cluster: LocalCluster, recipe: Path, run: Path) -> dict[str, Any]:
    """Submit the stage, and stop it after its first checkpoint; return its first record."""
    metrics = run / "pretrain" / "metrics.jsonl"
    job = cluster.submit("pretrain", recipe, wait=False).info["submission_id"]
    until(lambda: len(read_jsonl(metrics)) > 12, "pretraining does not begin")
    stopped = cluster.ray("job", "stop", job)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert cluster.status(job) == "STOPPED"
    done = read_jsonl(metrics)
    assert len(done) < PRETRAINING_STEPS, "it was over before it was stopped"
    return done[0]


def test_exit_codes_are_those_of_the_command(
    cluster: LocalCluster, finished: tuple[Path, str], tmp_path: Path
) -> None:
    recipe, run = finished[0], tmp_path / "run"
    wrong = cluster.submit("sft", recipe, f"run_dir={run}", "sft.epoch=1")
    assert (wrong.code, wrong.info["status"], wrong.info["driver_exit_code"]) == (1, "FAILED", 2)
    for text in (wrong.output, wrong.info["message"]):
        assert "unknown key sft.epoch: did you mean sft.epochs?" in text
        assert "Traceback" not in text
    broken = tmp_path / "broken"
    shutil.copytree(recipe.parent / "run" / "sft" / "final", broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    toy.copy_without(recipe.parent / "run", run, "dpo")
    failed = cluster.submit(
        "dpo", recipe, f"run_dir={run}", f"dpo.init={broken}", "resources.max_restarts=0"
    )
    assert (failed.code, failed.info["status"], failed.info["driver_exit_code"]) == (1, "FAILED", 1)
    assert f"the whole traceback is at the end of {run}/log.txt" in failed.info["message"]
    assert "SafetensorError" in (run / "log.txt").read_text()


def test_the_labelling_page_is_open_until_its_job_is_stopped(
    cluster: LocalCluster, finished: tuple[Path, str], tmp_path: Path, serve_port: int
) -> None:
    port = serve_port
    items = finished[0].parent / "comparisons.test.jsonl"
    section = f"label={{labellers: [ann, bob], items: {items}, port: {port}}}"
    done = cluster.submit("label", finished[0], f"run_dir={tmp_path}", section, wait=False)
    until(lambda: is_open(port), "the page does not open")
    job = done.info["submission_id"]
    assert cluster.status(job) == "RUNNING"
    assert cluster.ray("job", "stop", job).returncode == 0
    assert cluster.status(job) == "STOPPED"
    until(lambda: not is_open(port), "the page stays open", 30)


def test_the_endpoint_answers_until_its_job_is_stopped(
    cluster: LocalCluster, finished: tuple[Path, str], tmp_path: Path, serve_port: int
) -> None:
    port = serve_port
    model = finished[0].parent / "run" / "sft" / "final"
    section = f"serve={{models: {{sft: {{path: {model}}}}}, port: {port}, memory_gib: 0.02}}"
    done = cluster.submit("serve", finished[0], f"run_dir={tmp_path}", section, wait=False)
    until(lambda: is_open(port, "healthz", b""), "the endpoint does not open")
    job = done.info["submission_id"]
    assert cluster.status(job) == "RUNNING"
    assert cluster.ray("job", "stop", job).returncode == 0
    assert cluster.status(job) == "STOPPED"
    until(lambda: not is_open(port, "healthz", b""), "the endpoint stays open", 30)


def test_a_plan_is_a_job(cluster: LocalCluster, finished: tuple[Path, str]) -> None:
    done = succeeded(cluster.submit("plan", finished[0], "--address", cluster.address))
    assert f"{yaml.safe_load(finished[0].read_text())['name']} on" in done.output


def is_open(port: int, path: str = "", says: bytes = b"<html") -> bool:
    address = f"http://127.0.0.1:{port}/{path}"
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as page:
        return says in page.read()
    return False


def test_a_scaling_law_is_a_job(cluster: LocalCluster, tmp_path: Path) -> None:
    runs = []
    for index in range(4):
        width = 1000 * 3**index
        loss = 1.8 + 60 * (6.0 * width * 10**7) ** -0.15
        runs.append(toy.write_pretrained_run(tmp_path / f"r{index}", width, 10**7, loss))
    done = succeeded(cluster.submit("scaling_law", *runs, "--next", "1e14"))
    assert "predicted" in done.output
    law = json.loads((tmp_path / "scaling_law.json").read_text())
    assert law["exponents"][0] == pytest.approx(0.15, rel=0.01)
    assert (tmp_path / "scaling_law.png").is_file()
