"""The KL budget: what a step above it learns from, and when the policy comes back."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import KLConfig, PPOConfig
from rayrlhf.rl.budget import KLBudget, OverBudget, Rollback
from rayrlhf.rl.credit import Credit
from rayrlhf.rl.experience import Experience
from rayrlhf.training.backend import learning_rate
from tests.rl.inline import BANDIT, Metrics, timeless
from tests.rl.test_experience import rollout

REF = torch.arange(7.0)


def credit(kl: float) -> Credit:
    experience = Experience(
        rollout(),
        old_log_probs=torch.zeros(7),
        advantages=torch.ones(7),
        old_values=torch.zeros(7),
        returns=torch.ones(7),
    )
    return Credit(experience, kl, {})


def budget(**keys: Any) -> KLBudget:
    return KLBudget(PPOConfig(prompts="p", save_every=2, kl=KLConfig(budget=10, **keys)))


def test_steps_above_wait_then_learn_from_the_kl_alone(capsys: pytest.CaptureFixture[str]) -> None:
    watch = budget(patience=2)
    kls = [9.0, 10.0, 11.0, 12.0, math.nan, 8.0, 30.0]
    found = [watch.keep(credit(kl), REF, step, 0.02) for step, kl in enumerate(kls)]
    assert [each.updates_actor for each in found] == [True, True, False, True, True, True, False]
    assert [each.metrics["kl/over_budget"] for each in found] == [0, 0, 1, 1, 1, 0, 1]
    assert [each.metrics["kl/over_budget_count"] for each in found] == [0, 0, 1, 2, 3, 3, 4]
    for number in (3, 4):
        experience = found[number].experience
        assert not experience.advantages.any() and experience.kl_coef == 1
        assert torch.equal(experience.ref_log_probs, REF)
        assert torch.equal(experience.returns, torch.ones(7))  # the critic learns as ever
    assert found[5].experience.advantages.all() and found[5].experience.ref_log_probs is None
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "ppo: step 3: KL 11 nats per response, above ppo.kl.budget=10 for 1 in a row: it does not "
        "update the actor; after 2 the KL alone pulls it back",
        "ppo: step 4: KL 12 nats per response, above ppo.kl.budget=10 for 2 in a row: the actor "
        "learns from the KL alone until it is within it",
        "ppo: step 6: KL 8 nats per response, within ppo.kl.budget=10: the actor learns from the "
        "reward again",
        "ppo: step 7: KL 30 nats per response, above ppo.kl.budget=10 for 1 in a row: it does not "
        "update the actor; after 2 the KL alone pulls it back",
    ]


def test_a_rollback_goes_to_a_checkpoint_that_was_found_within() -> None:
    """Checkpoints are at every second step; that of step 4 holds the policy that is above."""
    watch = budget(on_exceed="rollback", patience=2, coef_factor=3, max_rollbacks=1)
    for step, kl in enumerate([1.0, 2.0, 9.0, 9.5, 11.0]):
        watch.keep(credit(kl), REF, step, 0.02)
    assert watch.good_step == 2
    with pytest.raises(OverBudget) as raised:
        watch.keep(credit(12.0), REF, 5, 0.02)
    assert raised.value.rollback == Rollback(step=2, number=1, kl_coef=pytest.approx(0.06), count=2)
    again = replace(watch, rollbacks=1)
    with pytest.raises(RuntimeError, match=r"ppo\.kl\.max_rollbacks=1 allows no more"):
        again.keep(credit(12.0), REF, 6, 0.06)


def test_stop_names_step_value_budget_and_fix() -> None:
    watch = budget(on_exceed="stop", patience=1)
    with pytest.raises(RuntimeError, match=r"step 8: KL 12 .*budget=10 for 1 .*larger ppo\.kl\.b"):
        watch.keep(credit(12.0), REF, 7, 0.02)


def test_without_a_budget_nothing_is_different() -> None:
    watch, plain = KLBudget(PPOConfig(prompts="p")), credit(1e9)
    assert watch.keep(plain, REF, 0, 0.02) is plain


@pytest.mark.parametrize(
    "keys",
    [{}, {"max_staleness": 1}, {"advantage_estimator": "grpo", "samples_per_prompt": 2}],
    ids=["ppo", "async", "grpo"],
)
def test_the_policy_stays_at_the_budget(
    train: Callable[..., Metrics], keys: dict[str, Any]
) -> None:
    far = {**BANDIT, "batch_size": 32 // keys.get("samples_per_prompt", 1)}
    if "advantage_estimator" in keys:
        del far["critic"]
    if not keys:
        free = train("free", **far)
        assert free[-1]["kl/ref_per_response"] > 2 and "kl/over_budget" not in free[0]
    rows = train("held", **far, **keys, kl={"budget": 0.5, "patience": 2})
    over = [row["kl/over_budget"] for row in rows]
    assert over == [float(row["kl/ref_per_response"] > 0.5) for row in rows]
    first = over.index(1)
    assert rows[first]["policy/loss"] is None  # it waits,
    assert rows[first]["weights/version"] == rows[first - 1]["weights/version"]
    assert over[first + 1] == 1  # is as far as it was,
    assert rows[first + 1]["policy/loss"] == 0 and rows[first + 1]["policy/kl_loss"] > 0
    assert 0 in over[first:]  # and comes back
    assert rows[-1]["kl/over_budget_count"] == sum(over)
    assert rows[-1]["kl/ref_per_response"] < 1
    # A step without an update holds no schedule up: two updates a step, over all steps.
    cfg = PPOConfig(prompts="p", **BANDIT)
    rates = ["policy/learning_rate" in row for row in rows]
    assert not rates[first] and rates[first + 1]
    for step, row in enumerate(rows):
        rate = learning_rate(2 * step + 1, cfg.actor, 2 * cfg.steps)
        assert row.get("policy/learning_rate", rate) == rate
    if "advantage_estimator" not in keys:
        assert all(row["value/loss"] > 0 for row in rows)


def test_a_resumed_run_equals_an_uninterrupted_one(
    train: Callable[..., Metrics], tmp_path: Path
) -> None:
    """Killed in the middle of a row of steps above the budget."""
    keys = {**BANDIT, "steps": 8, "save_every": 1, "keep_checkpoints": 8}
    keys["kl"] = {"budget": 0.2, "patience": 3}
    whole = timeless(train(**keys))
    over = [row["kl/over_budget"] for row in whole]
    cut = next(step for step in range(8) if over[step - 2 : step] == [1, 1])  # of 3
    for step in range(cut + 1, 9):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    assert timeless(train(**keys)) == whole


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kl": {"patience": 2}}, r"ppo\.kl\.patience=2 has no effect: set ppo\.kl\.budget"),
        ({"kl": {"budget": 1, "max_rollbacks": 2}}, r"set ppo\.kl\.on_exceed=rollback"),
        ({"kl": {"budget": 1}, "kl_target": 1}, r"kl_target=1 is not below ppo\.kl\.budget=1"),
        ({"kl": {"budget": 1, "on_exceed": "rollback"}, "kl_coef": 0}, r"ppo\.kl_coef=0"),
        ({"kl": {"budget": 0}}, "budget"),
    ],
)
def test_keys_that_cannot_act_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PPOConfig(prompts="p", **keys)
