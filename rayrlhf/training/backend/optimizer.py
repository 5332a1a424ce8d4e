"""AdamW, its schedule and clipping."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rayrlhf.config import TrainingConfig
from rayrlhf.training.schedule import warmup_cosine


def learning_rate(step: int, cfg: TrainingConfig, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first).

    Linear warm-up, then a cosine that ends, at the last step, at `min_learning_rate_ratio` of the
    peak.
    """
    return warmup_cosine(
        step,
        step + 1,
        peak=cfg.learning_rate,
        warmup=warmup_steps(cfg, total_steps),
        end=total_steps - 1,
        floor=cfg.min_learning_rate_ratio,
    )


def warmup_steps(cfg: TrainingConfig, total_steps: int) -> int:
    """Return how many optimizer steps the warm-up takes."""
    return round(cfg.warmup_ratio * total_steps) if cfg.warmup_steps is None else cfg.warmup_steps


def may_update(norm: float, norm_limit: float) -> bool:
    """Tell whether a gradient of this global norm updates the weights."""
    return math.isfinite(norm) and norm <= norm_limit


def make_optimizer(module: nn.Module, cfg: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases and embeddings do not decay."""
    embeddings = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, nn.Embedding)
        for parameter in child.parameters()
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # fused: one pass over memory per parameter, on CPU as on CUDA.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_eps,
        fused=True,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients in place to a global norm of at most `max_norm`; return their norm."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    total = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
    norm = total.item()
    if math.isfinite(norm):
        scale_gradients(trained, total, max_norm)
    return norm


def scale_gradients(trained: Sequence[nn.Parameter], norm: Tensor | float, max_norm: float) -> None:
    """Scale gradients, whose global norm is `norm`, in place to one of at most `max_norm`."""
    if norm > max_norm:
        nn.utils.clip_grads_with_norm_(trained, max_norm, torch.as_tensor(norm), foreach=True)
