"""KL divergence of the policy from the reference: estimators per token, and its coefficient.

Left out: the full-distribution KL, which needs the logits of both models for every token.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8 still squares and sums in float32; beyond it a ratio carries no information."""

MAX_RELATIVE_ERROR = 0.2
"""Clip of the proportional error (arXiv:1909.08593, section 2.2)."""


def guard_log_ratio(log_ratio: Tensor) -> Tensor:
    """Clamp a log-ratio to +-MAX_LOG_RATIO, so that its exponential and gradient stay finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, estimator: Estimator = "k1") -> Tensor:
    """Estimate KL(policy || reference) at the sampled tokens; all shapes alike, nats per token.

    k1 = log_probs - ref_log_probs is unbiased, and sums over tokens to the sequence's log-ratio:
    the one that belongs in the reward. k2 = k1^2 / 2 has the gradient of the true KL. k3 is
    unbiased and never negative. k2 and k3 are for losses and metrics.
    Source: http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = log_probs - ref_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        inverse = guard_log_ratio(-log_ratio)
        return inverse.exp() - 1 - inverse
    raise ValueError(f"estimator={estimator!r} is not an estimator: use k1, k2 or k3")


class KLController(Protocol):
    """What steers the coefficient of the KL penalty; `coef` is all its state."""

    coef: float

    def update(self, kl: float, num_responses: int) -> None:
        """Take in the mean KL of `num_responses` responses, in nats per response."""


class FixedKLController:
    """A coefficient that stays as it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_responses: int) -> None:
        """Change nothing."""


class AdaptiveKLController:
    """Steer the KL to `target` by proportional control in log space.

    `kl` and `target` are in nats per response (summed over its tokens); `horizon` is counted in
    responses. A checkpoint has to keep `coef`, and nothing else.
    Source: arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        if target <= 0 or horizon <= 0:
            raise ValueError(f"target={target}, horizon={horizon}: both must be above 0")
        self.coef = init
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_responses: int) -> None:
        """Raise the coefficient when `kl` (nats per response) is above the target, else lower it.

        The relative error is clipped to +-0.2; `num_responses` is how many responses `kl` is
        the mean of. One that is not finite says nothing, and would stay in the coefficient.
        """
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        # A batch larger than 5 horizons would turn the sign; it may take the coefficient to 0.
        self.coef *= max(1 + error * num_responses / self.horizon, 0.0)


def make_kl_controller(init: float, target: float | None, horizon: float) -> KLController:
    """Return an adaptive controller if there is a target (nats per response), else a fixed one."""
    if target is None:
        return FixedKLController(init)
    return AdaptiveKLController(init, target, horizon)


def importance_weights(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    mode: Literal["token", "token_mask", "sequence", "sequence_mask"] = "token",
) -> Tensor:
    """Return weights (B, T) that correct for rollouts sampled by another distribution, detached.

    `token` weighs each token by its own ratio, `sequence` all tokens of a response by the product
    of their ratios. Ratios above `cap` are cut to it, or to 0 with `*_mask`: no weight ever
    exceeds the cap. Padding gets 0. Source: truncated importance sampling, Ionides 2008.
    """
    if cap <= 0:
        raise ValueError(f"cap={cap}: the cap of importance weights must be above 0, for example 2")
    valid = mask.bool()
    log_ratio = torch.where(valid, log_probs - rollout_log_probs, 0.0).detach()  # (B, T)
    if mode in ("sequence", "sequence_mask"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    elif mode not in ("token", "token_mask"):
        raise ValueError(
            f"mode={mode!r} is not a mode: use token, token_mask, sequence or sequence_mask"
        )
    ratio = guard_log_ratio(log_ratio).exp()
    if mode.endswith("_mask"):
        weights = torch.where(ratio <= cap, ratio, 0.0)
    else:
        weights = ratio.clamp(max=cap)
    return torch.where(valid, weights, 0.0)
