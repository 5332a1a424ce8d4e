"""Sums and moments over the valid positions of a padded tensor.

What lies in padding is never read: a NaN or Inf there changes nothing, and gets gradient 0.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum `x` where `mask` is not 0; shapes alike, result 0-d."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average `x` where `mask` is not 0; an empty mask gives 0, not NaN."""
    return masked_sum(x, mask) / mask.bool().sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance of `x` where `mask` is not 0; an empty mask gives 0."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
