"""Credit assignment: rewards per token, GAE, group estimators, whitening.

Shapes: B responses, T response tokens, right-padded; `mask` (B, T) is 1 on generated tokens.
Float32 in and out; what lies under mask 0 is never read, and comes out as 0.
Source: GAE arXiv:1506.02438, PPO for RLHF arXiv:1909.08593, GRPO arXiv:2402.03300.
"""

import torch
from torch import Tensor

from rayrlhf.algorithms.masked import masked_mean, masked_variance

EPS = 1e-8


def clip_scores(scores_B: Tensor, *, clip: float | None) -> Tensor:
    """Clip scores to +-clip; None leaves them. For the score alone: the KL penalty stays whole."""
    return scores_B if clip is None else scores_B.clamp(-clip, clip)


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """Return -kl_coef * KL for every token, plus the score on the last generated one; (B, T).

    The last token is end-of-text, or whatever stands last in a truncated response. A response
    without any token has nowhere to put its score: its row is 0.
    Source: arXiv:2203.02155, eq. 2.
    """
    valid = mask_BT.bool()
    rewards = torch.where(valid, -kl_coef * kl_BT, 0.0)
    positions = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, positions, -1).amax(dim=1, keepdim=True)  # (B, 1), -1 when empty
    return torch.where(positions == last, rewards + scores_B.unsqueeze(1), rewards)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return generalized advantages and returns, (B, T) each; V after the last token is 0.

    values[:, t] is the value of the state before token t. Positions with mask 0, padding as well
    as tokens in mid-response that the policy did not write, are passed over: no decay, no reward,
    no value of theirs enters. returns = advantages + values, before any whitening.
    Source: arXiv:1506.02438, eq. 16.
    """
    valid = mask_BT.bool()
    values = torch.where(valid, values_BT, 0.0)
    rewards = torch.where(valid, rewards_BT, 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])  # (B,)
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        here = valid[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
    return advantages, advantages + values


def discounted_returns(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Return the sum of gamma^k * reward from each token on, (B, T); masked tokens as in `gae`.

    Source: REINFORCE++ arXiv:2501.03262, which takes it for the advantage, whitened.
    """
    zeros = torch.zeros_like(rewards_BT)
    return gae(rewards_BT, zeros, mask_BT, gamma=gamma, gae_lambda=1.0)[0]


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to standard deviation 1 over the mask, and to mean 0 unless shift_mean=False.

    Call it on the whole batch of a step, never on a rank's shard: the moments are those of `x`.
    Padding comes out as 0. Source: whitening in OpenAI's lm-human-preferences.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_variance(x, mask) + EPS)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def group_relative(
    scores_B: Tensor,
    *,
    samples_per_prompt: int,
    group_ids_B: Tensor | None = None,
    divide_by_std: bool = True,
) -> Tensor:
    """Return (score - group mean) / (group std + 1e-6), (B,); equal scores give 0.

    Groups are consecutive runs of `samples_per_prompt` responses; with `group_ids_B` (B,), those
    with the same id, in any order. Raises ValueError for groups of one: they hold no signal.
    Source: arXiv:2402.03300, section 4.1.2 (std with Bessel's correction); without the division,
    Dr. GRPO, arXiv:2503.20783.
    """
    scores, order = _grouped(scores_B, samples_per_prompt, group_ids_B)  # (P, G)
    centered = scores - scores.mean(dim=1, keepdim=True)
    if not divide_by_std:
        return _ungrouped(centered, order)
    return _ungrouped(centered / (scores.std(dim=1, keepdim=True) + 1e-6), order)


def leave_one_out(
    scores_B: Tensor, *, samples_per_prompt: int, group_ids_B: Tensor | None = None
) -> Tensor:
    """Return each score minus the mean of the others of its group, (B,).

    Groups as in `group_relative`; raises ValueError for groups of one.
    Source: RLOO, arXiv:2402.14740, section 3.3.
    """
    scores, order = _grouped(scores_B, samples_per_prompt, group_ids_B)  # (P, G)
    others = (scores.sum(dim=1, keepdim=True) - scores) / (samples_per_prompt - 1)
    return _ungrouped(scores - others, order)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over the mask; 0 when returns are constant.

    1 is a perfect critic, 0 one that is no better than a constant.
    """
    variance = masked_variance(returns, mask)
    if variance <= 0:
        return 0.0
    return float(1 - masked_variance(returns - values, mask) / variance)


def _grouped(
    scores_B: Tensor, samples_per_prompt: int, group_ids_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return scores as (P, G), and the (B,) places that the flattened result came from."""
    num_scores = scores_B.shape[0]
    if samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt={samples_per_prompt}: a group estimator compares the responses "
            "to one prompt; set samples_per_prompt=2 or more"
        )
    if num_scores % samples_per_prompt:
        raise ValueError(
            f"{num_scores} scores do not divide into groups of samples_per_prompt="
            f"{samples_per_prompt}: pass whole groups"
        )
    if group_ids_B is None:
        order = torch.arange(num_scores, device=scores_B.device)
    else:
        sizes = torch.unique(group_ids_B, return_counts=True)[1]
        if (sizes != samples_per_prompt).any():
            raise ValueError(
                f"group sizes {sizes.tolist()} are not all samples_per_prompt="
                f"{samples_per_prompt}: pass whole groups"
            )
        order = torch.argsort(group_ids_B, stable=True)
    return scores_B[order].view(-1, samples_per_prompt), order


def _ungrouped(advantages: Tensor, order: Tensor) -> Tensor:
    flat = advantages.flatten()
    return torch.empty_like(flat).index_copy(0, order, flat)
