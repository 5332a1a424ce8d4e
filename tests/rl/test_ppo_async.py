"""Rollouts that run ahead of the learner."""

import difflib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayrlhf.config import PPOConfig, RecipeError, parse
from rayrlhf.rl import ppo, ppo_async
from rayrlhf.rl.experience import Experience
from rayrlhf.rl.off_policy import correct
from tests.rl.inline import BANDIT, timeless
from tests.rl.test_experience import rollout

Train = Callable[..., list[dict[str, Any]]]


def test_every_response_is_as_old_as_allowed(train: Train) -> None:
    """Batch t + n starts on the weights of step t; none is started across a checkpoint."""
    rows = train(steps=8, max_staleness=2, save_every=5)
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 2, 2, 2, 0, 1, 2]
    assert [row["rollout/staleness_mean"] for row in rows] == [0, 1, 2, 2, 2, 0, 1, 2]
    assert [row["weights/version"] for row in rows] == list(range(1, 9))
    # Compared with the learner where both have the same weights.
    assert [row["kl/rollout_mismatch"] is None for row in rows] == [
        stale > 0 for stale in (0, 1, 2, 2, 2, 0, 1, 2)
    ]
    for row in rows:
        assert row["policy/first_ratio"] == 1
        assert row["rollout/dropped"] == row["rollout/interrupted_fraction"] == 0
        assert 0 < row["importance/weight_mean"] < 2


def test_a_resumed_run_equals_an_uninterrupted_one(
    train: Train,
    tmp_path: Path,
) -> None:
    keys = {"steps": 6, "save_every": 3, "max_staleness": 2, "kl_target": 0.5}
    whole = timeless(train(**keys))
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    saved = tmp_path / "run" / "checkpoints" / "step-00000003" / "training_state"
    assert json.loads((saved / "controller.json").read_text())["step"] == 3
    assert timeless(train(**keys)) == whole


def test_the_two_loops_differ_where_they_say() -> None:
    """Whoever changes one of them changes the other: these lines alone are of one loop only."""
    lines = [inspect.getsource(module.optimize).splitlines() for module in (ppo, ppo_async)]
    marked = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
    assert [line[1:].strip() for line in marked if line[0] == "-"] == [
        "sync_weights(roles.actor, roles.rollout, version=state.version)",
        "gate = Gate(cfg, roles, prompts)",
        'with timer("rollout"):  # 1. on-policy by construction',
        "rollout = roles.rollout.generate(prompts.take(step), step).wait()",
        'with timer("sync"):  # 5. no rollout on old weights',
        "if trains_actor:",
        "state.version += 1",
        "sync_weights(roles.actor, roles.rollout, version=state.version)",
        '**rollout_metrics(rollout, timer.seconds["time/rollout_s"]),',
    ]
    assert len(marked) == 9 + 12


@pytest.mark.parametrize("stale", ["wait", "drop"])
def test_ends_at_the_reward_of_the_synchronous_run(
    train: Train,
    stale: str,
) -> None:
    """The score counts token 5; five seeds of each."""

    def ends(**keys: Any) -> torch.Tensor:
        scores = []
        for seed in range(5):
            rows = train(f"{keys or 'sync'} {seed}", seed=seed, **BANDIT, **keys)
            scores.append(sum(row["reward/score_mean"] for row in rows[-3:]) / 3)
        return torch.tensor(scores)

    sync, ahead = ends(), ends(max_staleness=1, stale=stale)
    assert sync.mean() > 4.0
    spread = float(torch.stack([sync, ahead]).std(dim=1).max())
    assert abs(float(ahead.mean() - sync.mean())) < 2 * spread


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # pi_learner / pi_engine of the tokens: e, 1, 1/e and 8 | 1, 4 | 1
        ("token", [2, 1, 0.3679, 2, 1, 2, 1]),
        ("token_mask", [0, 1, 0.3679, 0, 1, 0, 1]),
        ("sequence", [2, 2, 2, 2, 2, 2, 1]),
        ("sequence_mask", [0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_37_no_importance_weight_is_above_the_cap(mode: str, expected: list[float]) -> None:
    batch = rollout()
    gaps = torch.tensor([1.0, 0.0, -1.0, 8.0, 0.0, 4.0, 0.0])
    experience = Experience(
        batch,
        old_log_probs=batch.log_probs + gaps,
        advantages=torch.full((7,), -3.0),
        old_values=torch.zeros(7),
        returns=torch.ones(7),
    )
    cfg = PPOConfig(prompts="p", max_staleness=1, importance_mode=mode)  # type: ignore[arg-type]
    assert cfg.cap == 2
    corrected, metrics = correct(experience, cfg)
    weights = corrected.advantages / -3.0
    assert weights.tolist() == pytest.approx(expected, abs=1e-4)
    assert metrics["importance/weight_mean"] == pytest.approx(sum(expected) / 7, abs=1e-4)
    cut = 0.0 if mode.endswith("mask") else 2.0
    assert metrics["importance/capped_fraction"] == pytest.approx(expected.count(cut) / 7)
    assert torch.equal(corrected.returns, experience.returns)

    same, nothing = correct(experience, PPOConfig(prompts="p"))
    assert same is experience and nothing == {}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stale": "drop"}, r"ppo\.stale=drop has no effect .* set ppo\.max_staleness=1"),
        ({"interrupt": True}, r"ppo\.interrupt=true has no effect"),
        ({"importance_mode": "sequence"}, r"ppo\.importance_cap=2"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"max_staleness": 1, "old_log_probs": "rollout"}, r"ppo\.old_log_probs=actor"),
        ({"importance_cap": 0}, "importance_cap"),
        ({"importance_cap": 2.0, "old_log_probs": "rollout"}, "whose old policy is the engine's"),
        ({"max_staleness": 1, "stale": "drop", "batch_size": 15}, r"does not divide over .*=2"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], said: str) -> None:
    tree = {
        "name": "x",
        "model": {"path": "m"},
        "resources": {"rollout": {"num_workers": 2}},
        "ppo": {"prompts": "p", "num_minibatches": 1, **keys},
    }
    with pytest.raises(RecipeError, match=said):
        parse(tree)
