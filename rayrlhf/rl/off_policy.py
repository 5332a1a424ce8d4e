"""What is learned from is not what was sampled by: weights that correct it, and how far it goes.

Three policies, as in decoupled PPO: the engine's, that sampled a token (`rollout.log_probs`: old
weights, other kernels); the learner's as the step begins (`old_log_probs`), around which the ratio
is clipped; and the one in training. The clipped surrogate corrects from the second to the third,
the importance weight w = min(pi_learner / pi_engine, cap) from the first to the second:

    sum over tokens of  w * min(r A, clip(r) A)        r = pi_theta / pi_learner

Left out: a correction of the critic's targets, which stay those of the sampled responses.
Source: arXiv:2505.24298 (AReaL), eq. 5; truncation: Ionides 2008.
"""

from dataclasses import replace

from torch import Tensor

from rayrlhf.algorithms.kl import importance_weights
from rayrlhf.config import PPOConfig
from rayrlhf.rl.experience import Experience, Rollout, flatten, pad_rows


def correct(experience: Experience, cfg: PPOConfig) -> tuple[Experience, dict[str, float]]:
    """Multiply the advantages by their importance weights; returns metrics of the weights beside.

    Without `ppo.importance_cap` all stays as it is, and there are no metrics.
    """
    if cfg.cap is None:
        return experience, {}
    rollout = experience.rollout
    lengths, mask = rollout.response_lengths, rollout.mask
    weights = importance_weights(  # (B, T)
        pad_rows(experience.old_log_probs, lengths),
        pad_rows(rollout.log_probs, lengths),
        mask,
        cap=cfg.cap,
        mode=cfg.importance_mode,
    )
    flat = flatten(weights, mask)  # (N,)
    cut = 0.0 if cfg.importance_mode.endswith("_mask") else cfg.cap
    return replace(experience, advantages=experience.advantages * flat), {
        "importance/weight_mean": float(flat.mean()),
        "importance/capped_fraction": float((flat == cut).float().mean()),
    }


def staleness(rollout: Rollout, version: int) -> dict[str, float]:
    """Return how many versions the oldest token of a response is behind `version`, mean and max.

    Beside it, the fraction of responses that weights of more than one version made.
    """
    behind = (version - rollout.weight_versions).float()  # (B,)
    mixed = (rollout.last_versions > rollout.weight_versions).float()
    return {
        "rollout/staleness_mean": float(behind.mean()),
        "rollout/staleness_max": float(behind.max()),
        "rollout/interrupted_fraction": float(mixed.mean()),
    }


def fresh_part(log_probs: Tensor, rollout: Rollout, version: int) -> tuple[Tensor, Tensor]:
    """Return log-probs (n,) of the learner and of the engine where both have weights `version`."""
    fresh = (rollout.weight_versions == version).repeat_interleave(rollout.response_lengths)
    return log_probs[fresh], rollout.log_probs[fresh]
