"""Credit: from scores and log-probs to the advantage of every token, for each learner of ppo.py.

    estimator      advantage of a token                                       critic   KL is in
    gae            GAE of the token rewards                                   yes      reward
    grpo           (R - mean of its group) / std of its group                 no       loss
    rloo           R - mean of the others of its group                        no       reward
    reinforce_pp   discounted token rewards from here on, whitened            no       reward

R is the sum of the token rewards of a response: its score, less beta * KL where the penalty is in
the reward. A group are the G responses to one prompt, which stand together; `grpo` and `rloo` give
all tokens of a response the same advantage. The KL penalty is in one place, which `ppo.kl_in` may
change, and never in both. The KL that the controller steers and the metrics show is always k1.
Source: arXiv:1506.02438 (GAE), 2402.03300 (GRPO), 2402.14740 (RLOO), 2501.03262 (REINFORCE++).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rayrlhf.algorithms.advantages import (
    clip_scores,
    discounted_returns,
    explained_variance,
    gae,
    group_relative,
    leave_one_out,
    token_rewards,
    whiten,
)
from rayrlhf.algorithms.kl import kl_estimate
from rayrlhf.config import PPOConfig
from rayrlhf.rl.experience import Experience, Rollout, flatten, pad_rows


@dataclass(frozen=True)
class Evaluation:
    """What the roles say of a rollout; flat (N,) float32 but for the scores."""

    old_log_probs: Tensor
    """Of the actor, nats."""
    ref_log_probs: Tensor
    """Of the reference, nats."""
    values: Tensor | None
    """Of the critic; None where there is none."""
    scores: Tensor
    """(B,)"""


@dataclass(frozen=True)
class Credit:
    """What a step learns from, and what it says of itself."""

    experience: Experience
    kl_per_response: float
    """Nats: k1 summed over a response's tokens, averaged over responses."""
    metrics: dict[str, float]
    updates_actor: bool = True
    """False in a step that is above the KL budget (budget.py)."""


def assign_credit(cfg: PPOConfig, rollout: Rollout, found: Evaluation, *, kl_coef: float) -> Credit:
    """Return the advantages of all tokens, and the critic's targets where there is a critic."""
    mask, lengths = rollout.mask, rollout.response_lengths  # (B, T)
    kl = pad_rows(kl_estimate(found.old_log_probs, found.ref_log_probs), lengths)  # (B, T)
    rewards = token_rewards(  # (B, T)
        judge(found.scores, rollout.truncated, cfg),
        kl,
        mask,
        kl_coef=0.0 if cfg.kl_in_loss else kl_coef,
    )
    values = None if found.values is None else pad_rows(found.values, lengths)  # (B, T)
    advantages, returns = estimate(cfg, rewards, values, mask)
    if cfg.whitens:
        advantages = whiten(advantages, mask)
    experience = Experience(
        rollout,
        old_log_probs=found.old_log_probs,
        advantages=flatten(advantages, mask),
        old_values=found.values,
        returns=None if returns is None else flatten(returns, mask),
        ref_log_probs=found.ref_log_probs if cfg.kl_in_loss else None,
        kl_coef=kl_coef if cfg.kl_in_loss else 0.0,
    )
    kl_per_response = float(kl.sum(dim=1).mean())
    metrics = {
        "reward/score_mean": float(found.scores.mean()),
        "reward/score_std": float(found.scores.std(correction=0)),
        "reward/return_mean": float(rewards.sum(dim=1).mean()),
        "kl/ref_per_response": kl_per_response,
        "kl/coef": kl_coef,
    }
    if values is not None and returns is not None:
        metrics["value/explained_variance"] = explained_variance(values, returns, mask)
    if cfg.compares_groups:
        groups = found.scores.view(-1, cfg.samples_per_prompt)  # (P, G)
        equal = (groups == groups[:, :1]).all(dim=1)
        metrics["reward/equal_groups"] = float(equal.float().mean())
    return Credit(experience, kl_per_response, metrics)


def estimate(
    cfg: PPOConfig, rewards: Tensor, values: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return advantages, before whitening, and returns for a critic; (B, T) as all that goes in."""
    if cfg.advantage_estimator == "gae":
        assert values is not None, "there is a critic"
        return gae(rewards, values, mask, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda)
    if cfg.advantage_estimator == "reinforce_pp":
        return discounted_returns(rewards, mask, gamma=cfg.gamma), None
    totals, size = rewards.sum(dim=1), cfg.samples_per_prompt  # (B,)
    if cfg.advantage_estimator == "grpo":
        compared = group_relative(totals, samples_per_prompt=size, divide_by_std=cfg.group_std)
    else:
        compared = leave_one_out(totals, samples_per_prompt=size)
    return compared.unsqueeze(1) * mask, None


def judge(scores: Tensor, truncated: Tensor, cfg: PPOConfig) -> Tensor:
    """Return (B,): scores clipped to +-reward_clip, less the penalty of truncated responses."""
    return clip_scores(scores, clip=cfg.reward_clip) - cfg.missing_eos_penalty * truncated.float()


def loss_weights(cfg: PPOConfig, mask: Tensor, num_tokens: int, num_responses: int) -> Tensor:
    """Return (b, 1): the weight of a response's tokens in a loss that is divided by `num_tokens`.

    1 for the mean over tokens; for the mean over responses of their means over tokens, what makes
    it one. `num_tokens` and `num_responses` are those of the whole minibatch.
    """
    lengths = mask.sum(dim=1, keepdim=True)  # (b, 1)
    if cfg.loss_mean == "token":
        return torch.ones_like(lengths)
    return num_tokens / (num_responses * lengths.clamp(min=1))
