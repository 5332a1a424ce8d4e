"""The commands of the README at toy size: the whole road, once, twice, and killed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rayrlhf import lineage
from rayrlhf.metrics import read_jsonl
from tests import toy

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo")


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    """Return the metrics that a rerun must repeat: all but the clock's."""
    return [
        {
            key: value
            for key, value in record.items()
            if not key.startswith(("time", "perf/")) and not key.endswith("tokens_per_s")
        }
        for record in read_jsonl(run / stage / "metrics.jsonl")
    ]


def test_the_run_directory_is_as_designed(finished: tuple[Path, str]) -> None:
    run = finished[0].parent / "run"
    for name in (
        "recipe.yaml",
        "lineage.json",
        "report.html",
        "corpus/manifest.json",
        "tokenizer/tokenizer.json",
        "evaluation/results.json",
    ):
        assert (run / name).is_file(), name
    assert list((run / "corpus").glob("*.arrow"))
    assert list((run / "evaluation").glob("*.png"))
    for stage in STAGES:
        records = read_jsonl(run / stage / "metrics.jsonl")
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        assert [list(r)[:2] for r in records] == [["step", "time"]] * len(records)
        assert list((run / stage / "checkpoints").glob("step-*/training_state"))
    lineage = json.loads((run / "lineage.json").read_text())
    assert list(lineage) == ["corpus", *STAGES, "evaluate"]


def test_every_final_model_loads_in_plain_transformers(finished: tuple[Path, str]) -> None:
    run = finished[0].parent / "run"
    for stage in ("pretrain", "sft", "dpo", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(run / stage / "final")
        tokenizer = AutoTokenizer.from_pretrained(run / stage / "final")
        assert len(tokenizer) <= model.config.vocab_size
    reward = AutoModelForSequenceClassification.from_pretrained(run / "reward" / "final")
    assert reward.config.num_labels == 1
    checkpoint = sorted((run / "ppo" / "checkpoints").glob("step-*"))[-1]
    AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not [p for p in run.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_ppo_logs_what_the_design_says(finished: tuple[Path, str]) -> None:
    for record in read_jsonl(finished[0].parent / "run" / "ppo" / "metrics.jsonl"):
        assert set(record) >= toy.PPO_METRICS
        assert record["kl/rollout_mismatch"] < 1e-3
        assert record["weights/version"] == record["step"]


def test_results_have_what_the_design_says(finished: tuple[Path, str]) -> None:
    toy.check_results(finished[0].parent / "run", "ppo_ptx")


def test_the_terminal_has_useful_lines_only(finished: tuple[Path, str]) -> None:
    said = finished[1]
    for stage in STAGES:
        assert f"{stage:>9} step" in said
    for words in (
        " records, 24 steps of 8 sequences, on average 8 per rank on 1, micro-batches of",
        "ppo 6 steps of 8 responses (8 prompts x 1), 2 updates a step on 4 responses each",
        " evaluate 8 prompts, answered by base, sft, dpo, ppo_ptx",
    ):
        assert words in said
    assert "sample:" in said
    assert "report.html" in said
    for noise in ("WARNING", "Warning", "INFO", "Traceback", "(RayTrainWorker", "vllm"):
        assert noise not in said


def test_a_second_run_does_nothing(finished: tuple[Path, str]) -> None:
    start = time.monotonic()
    done = toy.run("pipeline", finished[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged, nothing to do") == 7
    assert time.monotonic() - start < 30


def run_and_kill(recipe: Path, run: Path, stage: str, step: int, *overrides: str) -> None:
    """Start the pipeline, and kill its whole process group once `stage` has passed `step`."""
    log = (run.parent / "killed.log").open("a")
    process = subprocess.Popen(
        toy.command("pipeline", recipe, *overrides),
        env=toy.environment(),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    path = run / stage / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while len(read_jsonl(path)) < step:
        assert process.poll() is None, f"ended before {stage} step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.close()


def test_killed_at_any_time_it_resumes_to_the_same_numbers(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """SFT is not begun again: it is of this base model only if that has the same bytes."""
    recipe, run = finished[0], tmp_path / "run"
    whole = recipe.parent / "run"
    toy.copy_without(whole, run, "pretrain", "reward", "dpo", "ppo", "evaluate")
    overrides = (f"run_dir={run}", "evaluate=null")
    for stage, step in (("pretrain", 13), ("reward", 8), ("dpo", 7), ("ppo", 3)):
        run_and_kill(recipe, run, stage, step, *overrides)
    done = toy.run("pipeline", recipe, *overrides)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert metrics(run, stage) == metrics(whole, stage), stage
    made, expected = (lineage.read_json(folder / "lineage.json") for folder in (run, whole))
    for stage in ("corpus", *STAGES):
        assert made[stage]["outputs"] == expected[stage]["outputs"], stage
    assert made["sft"]["finished"] == expected["sft"]["finished"]


def test_two_rounds_killed_and_resumed(finished: tuple[Path, str], tmp_path: Path) -> None:
    """After the stages of a run that is there: they stay, and the evaluation has the rounds."""
    recipe, run = finished[0], tmp_path / "run"
    toy.copy_without(recipe.parent / "run", run, "evaluate")
    rounds_of = ("num_rounds=2", "judge=vader", "num_prompts=24")
    overrides = (f"run_dir={run}", *(f"rounds.{each}" for each in rounds_of))
    run_and_kill(recipe, run, "rounds/01/ppo", 3, *overrides)
    kept = [
        run / "rounds/01" / name for name in ("samples.jsonl", "reward/final/model.safetensors")
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    done = toy.run("pipeline", recipe, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.stat().st_mtime_ns for path in kept] == before
    for stage in ("reward", "ppo"):
        steps = [row["step"] for row in read_jsonl(run / f"rounds/01/{stage}/metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
    first = read_jsonl(run / "rounds/02/ppo/metrics.jsonl")[0]
    assert first["kl/ref_per_response"] != 0  # it goes on from round 1, the reference does not

    rounds = json.loads((run / "rounds/rounds.json").read_text())
    assert rounds["judge"] == "vader"
    sizes = [row["num_comparisons"] for row in rounds["rounds"]]
    assert sizes == [
        48 + rounds["rounds"][0]["num_new"],
        48 + sum(row["num_new"] for row in rounds["rounds"]),
    ]
    results = json.loads((run / "evaluation/results.json").read_text())
    assert results["rounds"] == rounds
    assert results["battles"]["models"][-2:] == ["round-1", "round-2"]
    for figure in ("entropy_nats_per_token", "distinct_2", "held_out_loss", "variety"):
        assert {"sft", "ppo_ptx", "round-1", "round-2"} <= set(results[figure]), figure
    assert results["hacking"]["trained"] == "round-2"
    for found in results["battles"]["judges"].values():
        gains = found["rating_gains"]
        assert {name: gain["over"] for name, gain in gains.items()} == {
            "round-1": "ppo_ptx",
            "round-2": "round-1",
        }
        rated = found["ratings"]
        for name, gain in gains.items():
            assert gain["low"] <= gain["elo"] <= gain["high"]
            assert gain["elo"] == pytest.approx(rated[name]["elo"] - rated[gain["over"]]["elo"])
    page = (run / "report.html").read_text()
    assert "Rounds of feedback" in page and "round 2" in page

    again = toy.run("pipeline", recipe, *overrides)
    assert again.stdout.count("unchanged, nothing to do") == 8, again.stdout + again.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resources": {"num_workers": 64}}, ["64 CPU asked for", "resources"]),
        ({"resources": {"gpus_per_worker": 1}}, ["1 GPU asked for, 0 registered"]),
        ({"sft": {"train": "nowhere.jsonl"}}, ["nowhere.jsonl", "no such file"]),
    ],
)
def test_bad_input_exits_2_before_any_actor_starts(
    tmp_path: Path, changes: dict[str, Any], says: list[str]
) -> None:
    done = toy.run("pipeline", toy.write_recipe(tmp_path, **changes))
    assert done.returncode == 2, done.stderr
    for text in says:
        assert text in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not (tmp_path / "run" / "corpus").exists()


TEN = {"prompt": "a", "responses": [f" {i}" for i in range(10)], "ranks": list(range(10))}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prompts", b"", "prompts.jsonl: empty file"),
        ("prompts", None, "prompts.jsonl: no such file"),
        ("demonstrations", b'{"prompt": "a"}\n', "demonstrations.jsonl:1: the record has no field"),
        ("corpus.train", b'{"text": "a"}\n{"text": \n', "corpus.train.jsonl:2: broken JSON"),
        ("corpus.train", b'{"text": "a"}\n{"text": "\xff"}\n', "corpus.train.jsonl:2: invalid UTF"),
        ("comparisons.train", json.dumps(TEN).encode(), "K must be from 2 to 9"),
    ],
)
def test_bad_data_exits_2_with_file_and_line(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    recipe = toy.write_recipe(tmp_path)
    path = tmp_path / f"{name}.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    done = toy.run("pipeline", recipe)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_tokenizer_that_does_not_fit_exits_2(
    tmp_path: Path, tiny_model: Path, tiny_tokenizer: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    recipe = toy.write_recipe(
        tmp_path, model={"path": str(tiny_model)}, tokenizer={"path": str(tmp_path / "larger")}
    )
    done = toy.run("pipeline", recipe)
    assert done.returncode == 2, done.stderr
    assert "ids up to 300, but the model has only 300 rows: set tokenizer.path" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not (tmp_path / "run" / "corpus").exists()
