"""PPO as the user runs it: Ray, five roles, the real vLLM; killed, and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.config import RecipeError, parse
from rayrlhf.metrics import read_jsonl
from rayrlhf.models import lora
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training.checkpoint import is_complete
from tests.external.scorer import Scorer, lengths, serving
from tests.rl.inline import engine_model, timeless

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import ray
from rayrlhf.config import parse
from rayrlhf.rl.ppo import train_ppo
from tests.rl.test_ppo_ray import copy_as_killed

ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
for task in map(json.loads, sys.argv[1:]):
    if "copy" in task:
        copy_as_killed(*task["copy"])
    else:
        train_ppo(parse(task))
"""


def make_run(folder: Path, model: Path) -> dict[str, Any]:
    """Lay out what the stages before PPO leave behind; returns the recipe."""
    reward = ScalarHeadModel.from_causal_lm(model, seed=1)
    reward.save_pretrained(folder / "reward" / "final")
    openings = ("The movie", "A bad film", "I like", "so happy", "The senate voted")
    lines = [json.dumps({"prompt": text}) for text in openings * 2]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "name": "ppo-test",
        "run_dir": str(folder),
        "model": {"path": str(model), "max_length": 64},
        "resources": {"actor": {"num_workers": 2}},
        "ppo": {
            "prompts": str(folder / "prompts.jsonl"),
            "steps": 5,
            "batch_size": 8,
            "samples_per_prompt": 2,
            "num_minibatches": 4,
            "max_response_tokens": 8,
            "save_every": 2,
            "sample_every": 2,
            "kl_target": 0.1,
            "kl_horizon": 200,
            "rollout_memory_gib": 0.02,
            "deadline_s": 400,
            "actor": {"learning_rate": 1e-3},
            "critic": {"learning_rate": 1e-3},
        },
    }


def copy_as_killed(whole: str, cut: str) -> None:
    """Copy a run of two steps as a kill after the first leaves it."""
    shutil.copytree(Path(whole) / "ppo", Path(cut) / "ppo")
    for lost in ("final", "checkpoints/step-00000002"):
        shutil.rmtree(Path(cut) / "ppo" / lost)


def start(log: Path, *tasks: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Run recipes, and make the copies that are asked for, in one process on one cluster."""
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *map(json.dumps, tasks)],
            cwd=ROOT,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=840) == 0, log.read_text(errors="replace")[-3000:]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scorer]:
    """Run an endpoint that counts characters."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(lengths) as server:
        yield server


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny_model: Path, endpoint: Scorer
) -> None:
    """Scored by a model, a function and an endpoint.

    In the uninterrupted run the roles take turns, which changes nothing but who waits for whom.
    """
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    model = engine_model(tmp_path / "model", tiny_model)
    recipes = {folder: make_run(folder, model) for folder in (cut, whole)}
    recipes[whole]["resources"]["layout"] = "colocated"
    (tmp_path / "style.py").write_text(
        "def vowels(prompts, responses):\n"
        "    return [sum(text.count(vowel) for vowel in 'aeiou') for text in responses]\n"
    )
    for folder, recipe in recipes.items():
        recipe["ppo"]["rewards"] = [
            {"model": str(folder / "reward" / "final")},
            {"function": f"{tmp_path}/style.py:vowels", "weight": 0.5},
            {"url": endpoint.url, "name": "length", "weight": -0.1},
        ]
    process = start(tmp_path / "cut.log", recipes[cut])
    deadline = time.monotonic() + 500
    while len(read_jsonl(cut / "ppo" / "metrics.jsonl")) < 3:
        assert process.poll() is None, (tmp_path / "cut.log").read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "ppo" / "final").exists()

    # Uninterrupted, beside what resumes.
    again = start(tmp_path / "again.log", recipes[cut], recipes[whole])
    finish(again, tmp_path / "again.log")

    rows = read_jsonl(whole / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert timeless(read_jsonl(cut / "ppo" / "metrics.jsonl")) == timeless(rows)
    for row in rows:
        assert (row["policy/first_ratio"], row["policy/first_clip_fraction"]) == (1, 0)
        assert row["kl/rollout_mismatch"] < 1e-4
        assert row["weights/version"] == row["step"]
        parts = [row[f"reward/{name}"] for name in ("reward", "vowels", "length")]
        score = parts[0] + 0.5 * parts[1] - 0.1 * parts[2]
        assert row["reward/score_mean"] == pytest.approx(score, abs=1e-4)
    assert rows[-1]["reward/length"] > 0
    assert rows[0]["kl/ref_per_response"] == 0
    assert rows[-1]["kl/ref_per_response"] != 0
    assert {s["step"] for s in read_jsonl(whole / "ppo" / "samples.jsonl")} == {2, 4, 5}

    for folder in (whole / "ppo" / "final", whole / "ppo" / "checkpoints" / "step-00000005"):
        assert is_complete(folder)
        AutoTokenizer.from_pretrained(folder)
    ends = [
        AutoModelForCausalLM.from_pretrained(run / "ppo" / "final").state_dict()
        for run in (cut, whole)
    ]
    begin = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in begin)
    assert any(not torch.equal(ends[0][name], begin[name]) for name in begin)


@pytest.mark.ray
@pytest.mark.slow
def test_zero_has_the_metrics_of_ddp_resumes_and_exports(tmp_path: Path, tiny_model: Path) -> None:
    """Two ranks each for the actor, which trains adapters, and the critic, which trains all."""
    model = engine_model(tmp_path / "model", tiny_model)
    ddp, zero, cut = (tmp_path / name for name in ("ddp", "zero", "cut"))
    # A small gradient's sign is rounding; eps keeps its step small.
    optimizer = {"learning_rate": 1e-3, "adam_eps": 1e-3}
    recipes = {folder: make_run(folder, model) for folder in (ddp, zero, cut)}
    zero_2 = {"backend": "deepspeed", "zero_stage": 2}
    zero_3 = {**zero_2, "zero_stage": 3, "offload": "cpu", "gradient_checkpointing": True}
    for folder, recipe in recipes.items():
        recipe["resources"]["critic"] = {"num_workers": 2}
        actor: dict[str, Any] = {**optimizer, "learning_rate": 1e-2, "lora": {"rank": 4}}
        critic = dict(optimizer)
        if folder != ddp:
            actor, critic = actor | zero_3, critic | zero_2
        recipe["ppo"] |= {"steps": 2, "save_every": 1, "actor": actor, "critic": critic}
    copy = {"copy": [str(zero), str(cut)]}
    tasks = [recipes[ddp], recipes[zero], copy, recipes[cut]]
    finish(start(tmp_path / "log", *tasks), tmp_path / "log")

    found = {
        folder: timeless(read_jsonl(folder / "ppo" / "metrics.jsonl")) for folder in (ddp, zero)
    }
    for row, expected in zip(found[zero], found[ddp], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert (row["policy/first_ratio"], row["policy/first_clip_fraction"]) == (1, 0)
        assert row["kl/rollout_mismatch"] < 1e-4
        assert row["policy/approx_kl"] > 0

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        return {name: weight.clone() for name, weight in state.items()}

    begin, trained, exported = map(weights, (model, ddp / "ppo" / "final", zero / "ppo" / "final"))
    assert exported.keys() == begin.keys()
    for name, weight in exported.items():
        torch.testing.assert_close(weight, trained[name], atol=1e-4, rtol=0)
    changed = {name for name in begin if not torch.equal(exported[name], begin[name])}
    assert changed and all(name.split(".")[-2].endswith("_proj") for name in changed)
    assert (zero / "ppo" / "final" / "adapter" / lora.WEIGHTS).exists()

    state = zero / "ppo" / "checkpoints" / "step-00000002" / "training_state"
    for role in ("actor", "critic"):
        assert sorted(file.name for file in (state / role).glob("optimizer*")) == [
            "optimizer-00000-of-00002-00000.safetensors",
            "optimizer-00001-of-00002-00000.safetensors",
        ]

    assert timeless(read_jsonl(cut / "ppo" / "metrics.jsonl")) == found[zero]
    resumed = weights(cut / "ppo" / "final")
    assert all(torch.equal(resumed[name], exported[name]) for name in begin)


@pytest.mark.ray
def test_a_shortage_names_the_resource_before_any_actor_starts(
    tmp_path: Path, tiny_model: Path
) -> None:
    import ray

    from rayrlhf.rl.ppo import train_ppo

    recipe = make_run(tmp_path / "run", tiny_model)
    recipe["resources"] = {"actor": {"num_workers": 1, "gpus": 1}}
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        begin = time.monotonic()
        with pytest.raises(RecipeError, match="1 GPU asked for, 0 registered"):
            train_ppo(parse(recipe))
        assert time.monotonic() - begin < 5
    finally:
        ray.shutdown()
