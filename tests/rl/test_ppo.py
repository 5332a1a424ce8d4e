"""The controller's loop, with the real workers in this process."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config import PPOConfig, RecipeError, parse
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import ppo
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ppo import train_ppo
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.state import restore
from rayrlhf.training.backend import learning_rate
from rayrlhf.training.checkpoint import is_complete, newest_checkpoint
from tests.rl.inline import PROMPTS, VOCAB, InlineHandle, timeless
from tests.toy import PPO_METRICS


def test_every_metric_is_logged(train: Callable[..., Any], tmp_path: Path) -> None:
    rows = train(steps=3, sample_every=2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= PPO_METRICS
        assert (row["policy/first_ratio"], row["policy/first_clip_fraction"]) == (1, 0)
        assert row["kl/rollout_mismatch"] < 1e-5
    assert rows[0]["kl/ref_per_response"] == 0
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert [s["step"] for s in samples] == [2] * 3 + [3] * 3
    assert {"prompt", "text", "score"} <= set(samples[0])


def test_a_huge_kl_coefficient_keeps_the_policy_at_the_reference(train: Callable[..., Any]) -> None:
    keys = {"steps": 8, "actor": {"learning_rate": 1e-2}, "missing_eos_penalty": 0.0}
    free = train("free", kl_coef=0.0, **keys)[-1]["kl/ref_per_response"]
    held = train("held", kl_coef=1000.0, **keys)[-1]["kl/ref_per_response"]
    assert free > 0.5
    assert abs(held) < 0.2 * free


def test_rerun_is_identical(train: Callable[..., Any]) -> None:
    assert timeless(train("a", steps=2)) == timeless(train("b", steps=2))


def test_resume_equals_an_uninterrupted_run(train: Callable[..., Any], tmp_path: Path) -> None:
    keys = {
        "steps": 4,
        "save_every": 2,
        "kl_target": 0.5,
        "kl_horizon": 100.0,
        "critic_warmup_steps": 1,
    }
    whole = timeless(train(**keys))
    assert len({row["kl/coef"] for row in whole}) == 4

    # Half-written: the one before it is taken, and the lines after it are written again.
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000004" / "manifest.json").unlink()
    saved = (checkpoints / "step-00000002" / "training_state" / "controller.json").read_text()
    assert json.loads(saved) == {
        "step": 2,
        "version": 1,
        "kl_coef": whole[2]["kl/coef"],
        "kl_budget": {"in_a_row": 0, "count": 0, "rollbacks": 0, "good_step": 0},
    }
    assert timeless(train(**keys)) == whole
    assert newest_checkpoint(tmp_path / "run") == checkpoints / "step-00000004"


def test_critic_warmup_freezes_the_actor_only(train: Callable[..., Any]) -> None:
    rows = train(steps=3, critic_warmup_steps=2, actor={"learning_rate": 1e-2})
    assert [row["weights/version"] for row in rows] == [0, 0, 1]
    for name in ("loss", "clip_fraction", "approx_kl", "first_ratio", "first_clip_fraction"):
        assert [row[f"policy/{name}"] is None for row in rows] == [True, True, False], name
    assert set(rows[0]) >= PPO_METRICS
    assert rows[1]["kl/ref_per_response"] == 0
    assert all(row["value/loss"] > 0 for row in rows)


def test_04_kl_enters_the_reward_and_nothing_else(train: Callable[..., Any]) -> None:
    """The first step starts at a KL of 0, so its coefficient changes nothing, in no minibatch.

    The second rolls out from equal weights at a KL that is not 0, and the returns, less the
    scores and the penalty of truncated responses, are -beta * KL.
    """
    keys = {"steps": 2, "actor": {"learning_rate": 1e-2}}
    without, with_kl = (timeless(train(str(coef), kl_coef=coef, **keys)) for coef in (0.0, 0.5))
    assert {**with_kl[0], "kl/coef": 0.0} == without[0]
    assert with_kl[0]["policy/approx_kl"] > 0  # where a penalty in the loss would act
    kl = with_kl[1]["kl/ref_per_response"]
    assert abs(kl) > 1e-3 and kl == without[1]["kl/ref_per_response"]
    for coef, row in ((0.0, without[1]), (0.5, with_kl[1])):
        penalty = row["rollout/truncated_fraction"] * PPOConfig(prompts="").missing_eos_penalty
        gap = row["reward/return_mean"] - row["reward/score_mean"] + penalty
        assert gap == pytest.approx(-coef * kl, abs=1e-5)


def test_on_resume_a_fixed_coefficient_is_the_recipes(tmp_path: Path) -> None:
    """That of the checkpoint counts where a controller has steered it; rollbacks stay in both."""
    folder = tmp_path / "training_state"
    folder.mkdir()
    saved = {"step": 2, "version": 2, "kl_coef": 0.07}
    back: dict[str, Any] = {"kl": {"budget": 1.0, "on_exceed": "rollback", "coef_factor": 3.0}}
    for rollbacks, keys, coef in (
        (0, {"kl_coef": 0.02}, 0.02),
        (0, {"kl_coef": 0.0}, 0.0),
        (0, {"kl_coef": 0.02, "kl_target": 0.5}, 0.07),
        (2, {"kl_coef": 0.02, **back}, 0.18),
        (2, {"kl_coef": 0.02, "kl_target": 0.5, **back}, 0.07),
    ):
        controller = {**saved, "kl_budget": {"rollbacks": rollbacks}}
        (folder / "controller.json").write_text(json.dumps(controller))
        state = restore(PPOConfig(prompts="", **keys), tmp_path)
        assert (state.step, state.kl.coef) == (2, pytest.approx(coef))


def test_33_learning_rates_follow_the_schedule(train: Callable[..., Any]) -> None:
    """One optimizer step per minibatch; the actor's schedule begins after the warm-up."""
    optimizer = {"learning_rate": 1e-2, "warmup_ratio": 0.5, "min_learning_rate_ratio": 0.1}
    keys = {"epochs": 2, "num_minibatches": 4, "critic_warmup_steps": 1, "save_every": 2}
    rows = train(steps=4, actor=optimizer, critic=optimizer, **keys)
    cfg = PPOConfig(prompts="", actor=optimizer, critic=optimizer, **keys)  # type: ignore[arg-type]
    for name, training, steps in (("critic", cfg.critic, 4), ("policy", cfg.actor, 3)):
        last = [learning_rate(8 * step + 7, training, 8 * steps) for step in range(steps)]
        assert last[-1] == pytest.approx(1e-3)
        assert [row.get(f"{name}/learning_rate") for row in rows[4 - steps :]] == last
    assert "policy/learning_rate" not in rows[0]


def test_prompts_follow_from_the_step() -> None:
    prompts = Prompts(PROMPTS, seed=0, batch_size=10)
    first = prompts.take(0) + prompts.take(1)
    assert sorted(first) == sorted(PROMPTS)  # one epoch: every prompt once
    assert prompts.take(1) == Prompts(PROMPTS, seed=0, batch_size=10).take(1)
    assert max(max(p) for p in PROMPTS) < VOCAB


def test_missing_models_are_named_before_ray_starts(tmp_path: Path, tiny_model: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The movie"}\n', encoding="utf-8")
    recipe = parse(
        {
            "name": "x",
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny_model), "max_length": 64},
            "ppo": {"prompts": str(prompts)},
        }
    )
    with pytest.raises(RecipeError, match="reward/final"):
        train_ppo(recipe)


def test_workers_of_another_folder_write_where_the_run_is(
    make_roles: Callable[..., Roles],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run_dir is relative to where the command was given, and Ray was started elsewhere."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    ScalarHeadModel.from_causal_lm(tiny_model).save_pretrained(here / "run" / "reward" / "final")
    (here / "prompts.jsonl").write_text('{"prompt": "The movie"}\n' * 8, encoding="utf-8")
    recipe = parse(
        {
            "name": "x",
            "run_dir": "run",
            "model": {"path": str(tiny_model), "max_length": 64},
            "ppo": {
                "prompts": "prompts.jsonl",
                "steps": 2,
                "batch_size": 8,
                "max_response_tokens": 4,
                "save_every": 1,
            },
        }
    )

    class Elsewhere(InlineHandle):
        """A worker in a process with another working directory."""

        def __getattr__(self, name: str) -> Any:
            method = super().__getattr__(name)
            call = method.function

            def there(*args: Any) -> Any:
                os.chdir(elsewhere)
                try:
                    return call(*args)
                finally:
                    os.chdir(here)

            method.function = there
            return method

    @contextmanager
    def launch(layout: Any, settings: Any, **_: float) -> Iterator[Roles]:
        os.chdir(elsewhere)
        roles = make_roles(settings["actor"], critic=settings["critic"])
        os.chdir(here)
        for group in vars(roles).values():
            for seat in group.seats:
                seat.worker = Elsewhere(seat.worker.worker)
        yield roles

    monkeypatch.setattr(ppo, "launch", launch)
    monkeypatch.setattr(ppo, "cluster_nodes", lambda: [{"CPU": 8.0}])
    monkeypatch.setattr(ppo.session, "connect", lambda recipe: None)
    monkeypatch.setattr(ppo.session, "require", lambda *args, **keys: None)
    final = train_ppo(recipe)
    assert final == here / "run" / "ppo" / "final" and is_complete(final)
    assert "| reward/score_mean |" in (final / "README.md").read_text()
    newest = newest_checkpoint(here / "run" / "ppo")
    assert newest is not None and newest.name == "step-00000002"
    assert (newest / "model.safetensors").is_file()
    assert not list(elsewhere.iterdir())

    # Resumed from a relative folder: the roles load what the others wrote.
    shutil.rmtree(newest)
    shutil.rmtree(final)
    assert is_complete(train_ppo(recipe)) and is_complete(newest)
