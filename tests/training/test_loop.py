"""The loop: resume equals uninterrupted, every stage in one process."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rayrlhf.config import Recipe
from rayrlhf.data.datasets import records_between
from rayrlhf.metrics import read_jsonl
from rayrlhf.training import checkpoint, loop
from rayrlhf.training.dpo import DPOStage
from rayrlhf.training.pretrain import PretrainStage
from rayrlhf.training.reward import RewardStage
from rayrlhf.training.sft import SFTStage
from rayrlhf.training.stage import Stage
from tests.training.ranks import Run, run_on_ranks

CPU = torch.device("cpu")
MakeRecipe = Callable[..., Recipe]


# A growing batch, a schedule in tokens, and a guard that finds spikes in ordinary steps.
SCHEDULED: dict[str, Any] = {
    "batch_size_start": 1,
    "batch_ramp_tokens": 160,
    "warmup_tokens": 60,
    "decay_tokens": 200,
    "loss_spike": {"window": 4, "threshold": 0.5},
}


class Killed(Exception):
    """Stands for SIGKILL."""


def comparable(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """Return the lines without what depends on the clock."""
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("time", "tokens_per_s") and not key.startswith(("time/", "perf/"))
        }
        for line in read_jsonl(folder / f"{name}.jsonl")
    ]


def fresh(recipe: Recipe, kind: type[Stage]) -> Stage:
    """Remove what the fixture put where the stage writes, and return the stage."""
    stage = kind(recipe)
    if not (stage.folder / "metrics.jsonl").exists():
        shutil.rmtree(stage.folder, ignore_errors=True)
    return stage


@pytest.mark.parametrize("kind", [PretrainStage, SFTStage, RewardStage, DPOStage])
@pytest.mark.parametrize("killed_at", range(1, 6))
def test_resume_equals_uninterrupted(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, kind: type[Stage], killed_at: int
) -> None:
    changes: dict[str, dict[str, Any]] = {"sft": {"dropout": 0.2}, "pretrain": SCHEDULED}
    whole = fresh(make_recipe("whole", **changes), kind)
    loop.run(whole, CPU)

    broken = fresh(make_recipe("broken", **changes), kind)
    step_of_loop = loop.train_step

    def dies(stage: Stage, backend: Any, step: int, micros: Any) -> dict[str, float]:
        if step == killed_at + 1:
            raise Killed
        return step_of_loop(stage, backend, step, micros)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(Killed):
        loop.run(broken, CPU)
    monkeypatch.setattr(loop, "train_step", step_of_loop)
    loop.run(kind(broken.recipe), CPU)

    expected = comparable(whole.folder)
    assert [line["step"] for line in expected] == list(range(1, whole.total_steps + 1))
    assert comparable(broken.folder) == expected
    assert comparable(broken.folder, "notes") == comparable(whole.folder, "notes")
    assert (kind is PretrainStage) == bool(comparable(whole.folder, "notes"))
    assert comparable(broken.folder, "samples") == comparable(whole.folder, "samples")
    for name in ("model.safetensors", "config.json"):
        assert (broken.folder / "final" / name).read_bytes() == (
            whole.folder / "final" / name
        ).read_bytes()


def test_a_half_written_checkpoint_is_not_resumed_from(make_recipe: MakeRecipe) -> None:
    whole = fresh(make_recipe("whole"), SFTStage)
    loop.run(whole, CPU)
    expected = comparable(whole.folder)
    newest = whole.folder / "checkpoints" / "step-00000004"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.rmtree(whole.folder / "final")
    assert checkpoint.newest_checkpoint(whole.folder) == newest.with_name("step-00000002")
    loop.run(SFTStage(whole.recipe), CPU)
    assert comparable(whole.folder) == expected


def test_embedding_noise_resumes_exactly(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Noise follows from the step, as dropout does."""
    names = {"whole": 5.0, "killed": 5.0, "clean": 0.0}
    recipes = {
        name: make_recipe(name, sft={"neftune_alpha": alpha, "eval_every": 1})
        for name, alpha in names.items()
    }
    runs = [Run(r, SFTStage, 5 if name == "killed" else None) for name, r in recipes.items()]
    run_on_ranks(runs, 1, tmp_path)
    whole, killed, clean = (comparable(recipe.path / "sft") for recipe in recipes.values())
    assert killed == whole
    assert whole[0]["loss"] != clean[0]["loss"]
    assert whole[0]["loss"] == pytest.approx(clean[0]["loss"], rel=0.1)


def test_folders_load_with_plain_transformers(make_recipe: MakeRecipe) -> None:
    for kind, auto in (
        (PretrainStage, AutoModelForCausalLM),
        (RewardStage, AutoModelForSequenceClassification),
    ):
        stage = fresh(make_recipe(), kind)
        loop.run(stage, CPU)
        for folder in (stage.folder / "final", stage.folder / "checkpoints" / "step-00000004"):
            assert checkpoint.is_complete(folder)
            _, report = auto.from_pretrained(folder, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]


def test_checkpoints_are_pruned_and_hold_no_pickle(make_recipe: MakeRecipe) -> None:
    stage = fresh(make_recipe(sft={"save_every": 1, "keep_checkpoints": 3}), SFTStage)
    loop.run(stage, CPU)
    assert sorted(p.name for p in (stage.folder / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]
    kinds = {path.suffix for path in stage.folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".jinja", ".md"}


def test_metrics_of_a_step(make_recipe: MakeRecipe) -> None:
    stage = fresh(make_recipe(), PretrainStage)
    loop.run(stage, CPU)
    lines = read_jsonl(stage.folder / "metrics.jsonl")
    for line in lines:
        assert {
            "step",
            "time",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "tokens_per_s",
            "epoch",
            "time/step_s",
            "skipped_steps",
        } <= set(line)
        assert line["tokens"] == 4 * 16
        # By hand: 4 rows of 16 tokens, each of which sees itself and those before; 15 have a loss.
        layer = 4 * 16 * 16 + 3 * 16 * 32
        flops = 6 * layer * 64 + 12 * 16 * 4 * 136 + 6 * len(stage.tokenizer) * 16 * 60
        rate = line["perf/matmul_tflops"] * 1e12
        assert line["perf/mfu"] == pytest.approx(flops / line["time/step_s"] / rate)
        assert 0 < line["perf/mfu"] < 1
        assert 0.1 < line["perf/peak_memory_gib"] < 64
    assert lines[-1]["epoch"] == pytest.approx(6 * 4 / 19)
    assert "eval/loss.books" in lines[2] and "eval/loss" in lines[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    samples = read_jsonl(stage.folder / "samples.jsonl")
    assert [(s["step"], s["kind"]) for s in samples] == [
        (1, "greedy"),
        (1, "sampled"),
        (6, "greedy"),
        (6, "sampled"),
    ]


def test_number_of_steps(make_recipe: MakeRecipe) -> None:
    plain = PretrainStage(make_recipe(pretrain={"max_steps": None, "epochs": 2.0}))
    assert plain.total_steps == 10  # 38 rows in batches of 4
    assert PretrainStage(make_recipe()).total_steps == 6


def test_what_follows_from_the_batch_size_is_said(make_recipe: MakeRecipe) -> None:
    resources = {"num_workers": 8}
    assert loop.derived_numbers(PretrainStage(make_recipe(resources=resources))) == (
        " pretrain 19 records, 6 steps of 4 sequences, on average 0.5 per rank on 8, "
        "micro-batches of up to 40 tokens"
    )
    assert "6 steps of 4 prompts, on average 4 per rank on 1" in loop.derived_numbers(
        RewardStage(make_recipe())
    )


def test_a_finished_stage_is_left_alone(make_recipe: MakeRecipe) -> None:
    stage = fresh(make_recipe(), SFTStage)
    loop.run(stage, CPU)
    before = (stage.folder / "final" / "model.safetensors").stat().st_mtime_ns
    assert loop.train_stage(stage.recipe, SFTStage) == stage.folder / "final"
    assert (stage.folder / "final" / "model.safetensors").stat().st_mtime_ns == before


class _Rows:
    """Stands for a stage: micro-batches are the numbers of the records."""

    num_records = 37

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.cfg = recipe, recipe.pretrain
        self.total_steps = 12
        self.read: list[list[int]] = []

    def costs(self, indices: Any) -> None:
        return None

    def batch(self, step: int) -> list[int]:
        return records_between(4 * step, 4 * step + 4, seed=0, num_records=self.num_records)

    def microbatches(self, indices: Any) -> list[int]:
        self.read.append(list(indices))
        return list(indices)


def steps_of(recipe: Recipe, world_size: int, start: int = 1) -> list[list[int]]:
    """Return what all ranks together read, step by step from `start`."""
    stages = [_Rows(recipe) for _ in range(world_size)]
    ahead = [
        loop.Prefetch(cast(Stage, stage), rank, world_size) for rank, stage in enumerate(stages)
    ]
    found = [
        sorted(row for reader in ahead for row in reader.take(step)[0]) for step in range(start, 13)
    ]
    for reader in ahead:
        reader.close()
    return found


def test_reading_is_the_same_for_any_number_of_workers_and_from_any_step(
    make_recipe: MakeRecipe,
) -> None:
    recipe = make_recipe()
    whole = steps_of(recipe, 1)
    assert len(set(sum(whole[:9], []))) == 36  # no row twice in the first epoch
    for world_size in (2, 3, 5):
        assert steps_of(recipe, world_size) == whole
    for start in range(1, 13):
        assert steps_of(recipe, 1 + start % 3, start) == whole[start - 1 :]


def test_the_next_batch_is_read_while_a_step_runs(make_recipe: MakeRecipe) -> None:
    stage = _Rows(make_recipe())
    ahead = loop.Prefetch(cast(Stage, stage), 0, 1)
    ahead.take(1)
    deadline = time.monotonic() + 10
    while len(stage.read) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(stage.read) == 2  # step 2, which nobody has asked for yet
    assert ahead.take(12)[0] == stage.read[-1]
    ahead.close()
    assert len(stage.read) == 3  # nothing after the last step


def test_waiting_for_data_is_a_metric(make_recipe: MakeRecipe) -> None:
    stage = fresh(make_recipe(), PretrainStage)
    loop.run(stage, CPU)
    lines = [json.loads(line) for line in (stage.folder / "metrics.jsonl").open()]
    assert all(line["time/data_wait_s"] >= 0 for line in lines)
