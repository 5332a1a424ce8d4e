"""Credit of every learner, worked by hand: two prompts, two responses each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rayrlhf.config import PPOConfig
from rayrlhf.rl.credit import Evaluation, assign_credit, judge, loss_weights
from rayrlhf.rl.experience import Rollout

LENGTHS = [2, 1, 3, 2]
ROLLOUT = Rollout(
    prompt_ids=torch.tensor([7, 7, 8, 8]),
    prompt_lengths=torch.ones(4, dtype=torch.int64),
    response_ids=torch.arange(8),
    response_lengths=torch.tensor(LENGTHS),
    log_probs=torch.zeros(8),
    truncated=torch.tensor([False, False, True, False]),
    weight_versions=torch.zeros(4, dtype=torch.int64),
    last_versions=torch.zeros(4, dtype=torch.int64),
)
# The log-ratio to the reference, k1, row by row: 1 | 0.5 -1 ...
KL = torch.tensor([1.0, 0.0, 0.5, -1.0, 2.0, 0.0, 0.0, 1.0])
SCORES = torch.tensor([3.0, 1.0, 2.0, 0.0])


def credit(
    values: Tensor | None = None, rollout: Rollout = ROLLOUT, scores: Tensor = SCORES, **keys: Any
) -> tuple[list[float], Any]:
    """Return the flat advantages and the whole Credit, for beta = 0.1 and no penalties."""
    cfg = PPOConfig(
        prompts="p",
        samples_per_prompt=2,
        **{"missing_eos_penalty": 0.0, "whiten_advantages": False, **keys},
    )
    found = Evaluation(KL - 2, torch.full((8,), -2.0), values, scores)
    result = assign_credit(cfg, rollout, found, kl_coef=0.1)
    return result.experience.advantages.tolist(), result


def test_gae_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    advantages, result = credit(values, gamma=0.5, gae_lambda=0.5)
    # Row 0: rewards -0.1, 3. delta_1 = 3 - 2 = 1; delta_0 = -0.1 + 0.5 * 2 - 1 = -0.1, + 0.25 * 1
    # Row 2: rewards 0.1, -0.2, 2.0: 2; -0.2 + 0.25 * 2; 0.1 + 0.25 * 0.3
    # Row 3: rewards 0, -0.1: -0.1; 0.25 * -0.1
    wanted = [0.15, 1.0, 0.95, 0.175, 0.3, 2.0, -0.025, -0.1]
    assert advantages == pytest.approx(wanted, abs=1e-6)
    assert result.experience.returns.tolist() == pytest.approx(
        [a + v for a, v in zip(wanted, values.tolist(), strict=True)], abs=1e-6
    )
    assert result.experience.ref_log_probs is None
    assert result.kl_per_response == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert "value/explained_variance" in result.metrics


def test_21_whitening_leaves_the_critics_targets_as_they_are() -> None:
    values = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.5, 0.0, 0.0, -1.0])
    (plain, apart), (whitened, both) = (
        credit(values, whiten_advantages=whiten) for whiten in (False, True)
    )
    assert plain != pytest.approx(whitened, abs=0.1)
    assert torch.equal(apart.experience.returns, both.experience.returns)


def test_grpo_by_hand() -> None:
    """The KL is in the loss, so groups compare 3 with 1 and 2 with 0: means 2, 1, std sqrt(2)."""
    advantages, result = credit(advantage_estimator="grpo")
    a = 1 / 2**0.5
    assert advantages == pytest.approx([a, a, -a, a, a, a, -a, -a], abs=1e-5)
    assert result.experience.ref_log_probs.tolist() == [-2.0] * 8
    assert result.experience.kl_coef == 0.1
    assert result.experience.old_values is None and result.experience.returns is None
    assert result.metrics["reward/return_mean"] == 1.5
    assert result.metrics["reward/equal_groups"] == 0
    assert not any(name.startswith("value/") for name in result.metrics)


def test_grpo_without_the_standard_deviation_by_hand() -> None:
    advantages, _ = credit(advantage_estimator="grpo", group_std=False)
    assert advantages == pytest.approx([1, 1, -1, 1, 1, 1, -1, -1], abs=1e-6)


def test_rloo_by_hand() -> None:
    """Totals with the KL: 3 - 0.1, 1 - 0.05, 2 - 0.1, 0 - 0.1; each less the other one."""
    advantages, result = credit(advantage_estimator="rloo")
    assert advantages == pytest.approx(
        [1.95, 1.95, -1.95, 2.0, 2.0, 2.0, -2.0, -2.0],
        abs=1e-5,
    )
    assert result.experience.ref_log_probs is None
    moved, _ = credit(advantage_estimator="rloo", kl_in="loss")
    assert moved == pytest.approx([2, 2, -2, 2, 2, 2, -2, -2], abs=1e-6)


def test_reinforce_pp_by_hand() -> None:
    advantages, _ = credit(advantage_estimator="reinforce_pp", gamma=0.5)
    # Row 0: 3; -0.1 + 0.5 * 3. Row 2: 2; -0.2 + 1; 0.1 + 0.4. Row 3: -0.1; -0.05
    wanted = [1.4, 3.0, 0.95, 0.5, 0.8, 2.0, -0.05, -0.1]
    assert advantages == pytest.approx(wanted, abs=1e-6)

    # Whitened over all 8 tokens of the batch, as it is by default.
    mean = sum(wanted) / 8
    std = (sum((x - mean) ** 2 for x in wanted) / 8) ** 0.5
    whitened, _ = credit(advantage_estimator="reinforce_pp", gamma=0.5, whiten_advantages=None)
    assert whitened == pytest.approx([(x - mean) / std for x in wanted], abs=1e-5)


@pytest.mark.parametrize(
    ("learner", "whitens"),
    [("gae", True), ("grpo", False), ("rloo", False), ("reinforce_pp", True)],
)
def test_22_who_whitens_by_default(learner: str, whitens: bool) -> None:
    values = torch.zeros(8) if learner == "gae" else None
    keys = {"advantage_estimator": learner}
    usual, _ = credit(values, whiten_advantages=None, **keys)
    asked, _ = credit(values, whiten_advantages=whitens, **keys)
    other, _ = credit(values, whiten_advantages=not whitens, **keys)
    assert usual == asked != other


def test_36_advantages_follow_their_groups_and_equal_scores_give_0() -> None:
    scores = torch.tensor([2.0, 2.0, 5.0, 1.0])
    for learner in ("grpo", "rloo"):
        advantages, result = credit(
            scores=scores, advantage_estimator=learner, kl_in="loss", missing_eos_penalty=0.0
        )
        assert advantages[:3] == [0, 0, 0]
        assert advantages[3] > 0 > advantages[-1]
        assert result.metrics["reward/equal_groups"] == 0.5

    # Prompts in another order: the same advantages in that order.
    swap = [2, 3, 0, 1]
    swapped = replace(
        ROLLOUT,
        response_lengths=ROLLOUT.response_lengths[swap],
        truncated=ROLLOUT.truncated[swap],
    )
    keys = {"advantage_estimator": "grpo"}
    there, _ = credit(scores=scores, **keys)
    here, _ = credit(rollout=swapped, scores=scores[swap], **keys)
    assert here == there[3:] + there[:3]


def test_03_the_kl_of_metrics_and_controller_is_k1_wherever_the_penalty_is() -> None:
    kls = {
        credit(advantage_estimator="rloo", kl_in=place)[1].kl_per_response
        for place in ("reward", "loss")
    }
    assert list(kls) == [pytest.approx(0.875)]


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


def test_31_the_mean_over_responses_is_of_their_means_over_tokens() -> None:
    """Losses 1, 3 and 8 in two responses of 2 and 1 tokens: (2 + 8) / 2, however they are split."""
    losses, mask = torch.tensor([[1.0, 3.0], [8.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    by_token = PPOConfig(prompts="p")
    by_sequence = PPOConfig(prompts="p", loss_mean="sequence")

    def mean(cfg: PPOConfig, *parts: slice) -> float:
        weighted = [losses[p] * mask[p] * loss_weights(cfg, mask[p], 3, 2) for p in parts]
        return sum(float(part.sum()) for part in weighted) / 3

    assert mean(by_token, slice(0, 2)) == 4.0
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        assert mean(by_sequence, *parts) == pytest.approx(5.0)
    assert loss_weights(by_sequence, torch.zeros(1, 2), 3, 2).isfinite().all()  # no work
