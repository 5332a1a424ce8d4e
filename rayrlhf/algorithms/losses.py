"""Losses as sums over valid tokens, with the sums of their diagnostics.

Every loss returns (loss_sum, {name: sum}); the metrics are detached 0-d tensors. The caller
divides all of them by one global count (valid tokens of the whole mini-batch, over all ranks and
micro-batches), so that splitting a batch never changes the gradient. An empty mask gives 0.

Shapes: B responses, T response tokens; `mask` is 1 on generated tokens, and what lies under 0 is
never read. Source: PPO arXiv:1707.06347, InstructGPT arXiv:2203.02155.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rayrlhf.algorithms.kl import guard_log_ratio, kl_estimate
from rayrlhf.algorithms.masked import masked_sum

Metrics = dict[str, Tensor]


def causal_lm_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """Sum the cross-entropy (nats) of `labels` (B, S) under `logits` (B, S, V) over `mask` (B, S).

    Nothing is shifted here: labels[:, t] is the token that logits[:, t] predict, which is
    input_ids[:, t + 1] for a causal model.
    """
    valid = mask.bool()
    targets = torch.where(valid, labels, 0)  # padding may hold ids outside the vocabulary
    nll = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return negative_log_likelihood(-nll.view_as(targets), mask)


def negative_log_likelihood(log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Metrics]:
    """Sum -log_probs (nats) over `mask`; (B, S) each. The language-model loss from log-probs."""
    loss = -masked_sum(log_probs, mask)
    return loss, {"loss": loss.detach()}


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Sum the clipped surrogate -min(r A, clip(r) A) over the mask; all (B, T).

    `dual_clip` (above 1) bounds the loss of a bad token (A < 0) at -dual_clip * A, as a ratio
    that exploded would otherwise dominate the batch (arXiv:1912.09729, eq. 5). To weigh tokens
    (see `kl.importance_weights`), multiply the advantages: weights are not negative, so they
    leave the minimum where it is. Source: arXiv:1707.06347, eq. 7.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip}: it bounds the ratio from above; set it above 1")
    valid = mask.bool()
    advantages = torch.where(valid, advantages, 0.0)
    log_ratio = guard_log_ratio(torch.where(valid, log_probs - old_log_probs, 0.0))
    ratio = log_ratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if dual_clip is not None:
        bounded = torch.max(surrogate, dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    loss = -masked_sum(surrogate, mask)
    with torch.no_grad():
        metrics = {
            "policy/loss": loss.detach(),
            "policy/clip_fraction": masked_sum(((ratio - 1).abs() > clip).float(), mask),
            # k3 of old to new: http://joschu.net/blog/kl-approx.html
            "policy/approx_kl": masked_sum(ratio - 1 - log_ratio, mask),
            "policy/ratio": masked_sum(ratio, mask),
        }
    return loss, metrics


def kl_loss(
    log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Sum k3 of the policy to the reference over the mask, nats; all (B, T).

    `weights` (B, T) or (B, 1) weigh the loss, and not the metric.
    Source: GRPO, arXiv:2402.03300, eq. 4.
    """
    valid = mask.bool()
    log_probs, ref_log_probs = (torch.where(valid, x, 0.0) for x in (log_probs, ref_log_probs))
    kl = kl_estimate(log_probs, ref_log_probs, estimator="k3")
    loss = masked_sum(kl if weights is None else kl * weights, mask)
    return loss, {"policy/kl_loss": masked_sum(kl.detach(), mask)}


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, Metrics]:
    """Sum 0.5 * max((V - R)^2, (V_clipped - R)^2) over the mask; all (B, T).

    V_clipped keeps within +-clip of the value at rollout time. `value/clip_fraction` counts the
    tokens where the clipped error is the larger one, which have no gradient.
    Source: OpenAI baselines ppo2; arXiv:1909.08593.
    """
    valid = mask.bool()
    values, old_values, returns = (
        torch.where(valid, x, 0.0) for x in (values, old_values, returns)
    )
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    loss = 0.5 * masked_sum(torch.max(error, clipped_error), mask)
    metrics = {
        "value/loss": loss.detach(),
        "value/clip_fraction": masked_sum((clipped_error > error).float(), mask),
    }
    return loss, metrics
