"""The controller's loop, with the real workers in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import PPOConfig, RecipeError, parse
from rayrlhf.metrics import MetricsLogger, read_jsonl
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ppo import Prompts, check_mismatch, judge, optimize, restore, train_ppo
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.training.checkpoint import newest_checkpoint
from tests.rl.inline import VOCAB
from tests.toy import PPO_METRICS

PROMPTS = [[3, 4, 2 + i % 10] for i in range(20)]
Metrics = list[dict[str, Any]]


@pytest.fixture
def train(
    make_roles: Callable[..., Roles],
    settings: Callable[..., RoleSettings],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Callable[..., Metrics]:
    """Return train(name, **keys of PPOConfig): run the loop; returns metrics.jsonl."""

    def run(name: str = "run", *, seed: int = 0, **keys: Any) -> Metrics:
        own = settings(seed=seed, **keys)
        stage = tmp_path / name
        checkpoint = newest_checkpoint(stage)
        state = restore(own.ppo, checkpoint)
        roles = make_roles(own, checkpoint=checkpoint)
        with MetricsLogger(stage, start_step=state.step) as log:
            optimize(
                own.ppo, roles, Prompts(PROMPTS, seed, own.ppo.batch_size), state, log, tokenizer
            )
        return read_jsonl(stage / "metrics.jsonl")

    return run


def timeless(rows: Metrics) -> Metrics:
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith("time") and name != "rollout/tokens_per_s"
        }
        for row in rows
    ]


def test_every_metric_is_logged(train: Callable[..., Any], tmp_path: Path) -> None:
    rows = train(steps=3, sample_every=2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= PPO_METRICS
        assert (row["policy/first_ratio"], row["policy/first_clip_fraction"]) == (1, 0)
        assert row["kl/rollout_mismatch"] < 1e-5
    assert rows[0]["kl/ref_per_response"] == pytest.approx(0, abs=1e-5)
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert [s["step"] for s in samples] == [2] * 3 + [3] * 3
    assert {"prompt", "text", "score"} <= set(samples[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_rises_on_a_bandit(train: Callable[..., Any], seed: int) -> None:
    """The score counts token 5: a tenth of the tokens at first."""
    rows = train(
        seed=seed,
        steps=10,
        batch_size=32,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        actor={"learning_rate": 2e-2},
        critic={"learning_rate": 1e-2},
    )
    scores = [row["reward/score_mean"] for row in rows]
    assert sum(scores[-3:]) / 3 > 2.0 + sum(scores[:2]) / 2


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
    assert json.loads(saved) == {"step": 2, "version": 1, "kl_coef": whole[2]["kl/coef"]}
    assert timeless(train(**keys)) == whole
    assert newest_checkpoint(tmp_path / "run") == checkpoints / "step-00000004"


def test_critic_warmup_freezes_the_actor_only(train: Callable[..., Any]) -> None:
    rows = train(steps=3, critic_warmup_steps=2, actor={"learning_rate": 1e-2})
    assert [row["weights/version"] for row in rows] == [0, 0, 1]
    assert ["policy/loss" in row for row in rows] == [False, False, True]
    assert rows[1]["kl/ref_per_response"] == pytest.approx(0, abs=1e-5)
    assert all("value/loss" in row for row in rows)


def test_kl_enters_the_reward_and_nothing_else(train: Callable[..., Any]) -> None:
    keys = {"steps": 2, "actor": {"learning_rate": 1e-2}}
    without, with_kl = (train(str(coef), kl_coef=coef, **keys) for coef in (0.0, 0.5))
    assert without[0]["policy/loss"] == pytest.approx(with_kl[0]["policy/loss"], abs=1e-4)
    gap = without[1]["reward/return_mean"] - without[1]["reward/score_mean"]
    penalty = without[1]["rollout/truncated_fraction"] * PPOConfig(prompts="").missing_eos_penalty
    assert gap == pytest.approx(-penalty, abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [3.0, -5.0]),
        ({"missing_eos_penalty": 0.0}, [3.0, -4.0]),
        ({"reward_clip": 1.0}, [1.0, -2.0]),  # clipped first, then the penalty
    ],
)
def test_missing_eos_is_penalised_after_the_clip(
    keys: dict[str, float], expected: list[float]
) -> None:
    cfg = PPOConfig(prompts="p", **keys)  # type: ignore[arg-type]
    scores = judge(torch.tensor([3.0, -4.0]), torch.tensor([False, True]), cfg)
    assert scores.tolist() == expected


@pytest.mark.parametrize("gap", [0.01, float("nan")])
def test_a_mismatch_stops_the_run(gap: float) -> None:
    from tests.rl.test_experience import rollout

    batch = rollout()
    cfg = PPOConfig(prompts="p")
    assert check_mismatch(batch.log_probs + 1e-5, batch, cfg) == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(RuntimeError, match=r"kl/rollout_mismatch=.* ppo\.kl_rollout_mismatch_max"):
        check_mismatch(batch.log_probs + gap, batch, cfg)


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
