"""Every learner on the same loop: rewards rise, resuming is exact, and no critic is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.rl.layout import plan
from rayrlhf.training.checkpoint import newest_checkpoint
from tests.rl.inline import timeless
from tests.toy import PPO_METRICS

GROUPS = {"batch_size": 8, "samples_per_prompt": 4}
LEARNERS: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 32, "critic": {"learning_rate": 1e-2}},
    "ppo-ptx": {
        "batch_size": 32,
        "critic": {"learning_rate": 1e-2},
        "ptx_coef": 0.1,
        "ptx_batch_size": 4,
    },
    "grpo": {"advantage_estimator": "grpo", **GROUPS},
    "rloo": {"advantage_estimator": "rloo", **GROUPS},
    "reinforce_pp": {"advantage_estimator": "reinforce_pp", "batch_size": 32},
}
CRITIC_FREE = ("grpo", "rloo", "reinforce_pp")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("learner", LEARNERS)
def test_41_reward_rises_on_a_bandit(
    train: Callable[..., Any], corpus: Path, learner: str, seed: int
) -> None:
    """The score counts token 5: a tenth of the tokens at first."""
    rows = train(
        seed=seed,
        steps=10,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        actor={"learning_rate": 2e-2},
        corpus=str(corpus),
        **LEARNERS[learner],
    )
    scores = [row["reward/score_mean"] for row in rows]
    assert sum(scores[-3:]) / 3 > 2.0 + sum(scores[:2]) / 2


@pytest.mark.parametrize("learner", CRITIC_FREE)
def test_without_a_critic_resume_equals_an_uninterrupted_run(
    train: Callable[..., Any], tmp_path: Path, learner: str
) -> None:
    keys = {
        **LEARNERS[learner],
        "steps": 4,
        "save_every": 2,
        "kl_target": 0.5,
        "kl_horizon": 100.0,
    }
    whole = timeless(train(**keys))
    assert not [name for row in whole for name in row if name.startswith(("value/", "critic/"))]
    wanted = {name for name in timeless([dict.fromkeys(PPO_METRICS)])[0] if "value" not in name}
    assert all(set(row) >= wanted for row in whole)

    checkpoints = tmp_path / "run" / "checkpoints"
    assert not (checkpoints / "step-00000004" / "training_state" / "critic").exists()
    (checkpoints / "step-00000004" / "manifest.json").unlink()
    assert timeless(train(**keys)) == whole
    assert newest_checkpoint(tmp_path / "run") == checkpoints / "step-00000004"


@pytest.mark.parametrize("learner", LEARNERS)
def test_04_the_kl_penalty_is_in_the_reward_or_in_the_loss(
    train: Callable[..., Any], corpus: Path, learner: str
) -> None:
    keys = {**LEARNERS[learner], "steps": 2, "corpus": str(corpus), "num_minibatches": 1}
    found = {place: train(place, kl_in=place, kl_coef=0.5, **keys) for place in ("reward", "loss")}
    usual = timeless(train("usual", kl_coef=0.5, **keys))
    assert usual == timeless(found["loss" if learner == "grpo" else "reward"])

    reward, loss = found["reward"][1], found["loss"][1]
    assert "policy/kl_loss" not in reward and loss["policy/kl_loss"] > 0
    penalised = reward["reward/score_mean"] - 0.5 * reward["kl/ref_per_response"]
    truncated = reward["rollout/truncated_fraction"]
    assert reward["reward/return_mean"] == pytest.approx(penalised - truncated, abs=1e-5)
    assert loss["reward/return_mean"] == pytest.approx(
        loss["reward/score_mean"] - loss["rollout/truncated_fraction"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("learner", "place"), [("grpo", "loss"), ("rloo", "loss"), ("reinforce_pp", "reward")]
)
def test_either_kl_penalty_keeps_the_policy_at_the_reference(
    train: Callable[..., Any], learner: str, place: str
) -> None:
    keys = {
        **LEARNERS[learner],
        "steps": 8,
        "actor": {"learning_rate": 1e-2},
        "missing_eos_penalty": 0.0,
        "kl_in": place,
    }
    free = train("free", kl_coef=0.0, **keys)[-1]["kl/ref_per_response"]
    held = train("held", kl_coef=1000.0, **keys)[-1]["kl/ref_per_response"]
    assert free > 0.3
    assert abs(held) < 0.2 * free


def recipe(**ppo: Any) -> Recipe:
    tree = {"prompts": "p", "samples_per_prompt": 2, **ppo}
    resources = {"critic": {"num_workers": 7, "gpus": 1}}
    return parse({"name": "x", "model": {"path": "m"}, "ppo": tree, "resources": resources})


@pytest.mark.parametrize("learner", CRITIC_FREE)
def test_no_critic_is_planned_and_resources_critic_is_ignored(learner: str) -> None:
    free = recipe(advantage_estimator=learner)
    roles = ["actor", "reference", "reward", "rollout"]
    assert [place.role for place in plan(free).places] == roles
    assert plan(free).demand == [{"CPU": 0.25}] * 4
    with pytest.raises(RecipeError, match=r"does not divide over\s+resources\.critic"):
        recipe()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"advantage_estimator": "grpo", "samples_per_prompt": 1}, "ppo.samples_per_prompt=1"),
        ({"advantage_estimator": "rloo", "samples_per_prompt": 1}, "set it to 2 or more"),
        ({"advantage_estimator": "grpo", "value_clip": 0.1}, "ppo.value_clip has no effect"),
        ({"advantage_estimator": "rloo", "critic_warmup_steps": 3}, "ppo.critic_warmup_steps"),
        ({"advantage_estimator": "rloo", "gamma": 0.9}, "ppo.gamma has no effect"),
        ({"advantage_estimator": "reinforce_pp", "gae_lambda": 0.9}, "ppo.gae_lambda"),
        (
            {"advantage_estimator": "reinforce_pp", "critic": {"learning_rate": 1e-3}},
            "ppo.critic has no effect with ppo.advantage_estimator=reinforce_pp",
        ),
        ({"advantage_estimator": "rloo", "group_std": False}, "set advantage_estimator=grpo"),
        ({"kl_in": "both"}, "'reward' or 'loss'"),
    ],
)
def test_a_key_that_the_learner_does_not_read_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(**keys)
    assert said in str(error.value)


def test_a_recipe_that_a_critic_free_run_wrote_loads_again() -> None:
    free = recipe(advantage_estimator="grpo")
    assert parse(free.model_dump(mode="json")) == free


def test_actor_of_a_group_learner_sees_equal_scores_as_no_signal(
    train: Callable[..., Any],
) -> None:
    keys = {**LEARNERS["grpo"], "steps": 2, "kl_coef": 0.0, "temperature": 1e-4}
    rows = train(missing_eos_penalty=0.0, **keys)  # greedy: all responses of a group are the same
    assert [row["reward/equal_groups"] for row in rows] == [1.0, 1.0]
    assert [row["policy/loss"] for row in rows] == [0.0, 0.0]
    assert torch.tensor([row["policy/grad_norm"] for row in rows]).isfinite().all()
