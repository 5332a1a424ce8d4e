"""Moments over a mask."""

import torch

from rayrlhf.algorithms.masked import masked_mean, masked_sum, masked_variance

NAN = float("nan")


def test_moments_ignore_what_lies_in_padding() -> None:
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, float("inf"), NAN]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert masked_sum(x, mask) == 9
    assert masked_mean(x, mask) == 3
    torch.testing.assert_close(masked_variance(x, mask), torch.tensor(8 / 3))


def test_31_empty_mask_gives_zero_not_nan() -> None:
    x, mask = torch.full((2, 3), NAN), torch.zeros(2, 3)
    assert masked_sum(x, mask) == masked_mean(x, mask) == masked_variance(x, mask) == 0


def test_gradient_in_padding_is_zero() -> None:
    x = torch.tensor([2.0, NAN], requires_grad=True)
    masked_mean(x.square(), torch.tensor([1.0, 0.0])).backward()
    assert x.grad is not None
    assert x.grad[0] == 4
