"""PPO and language-model losses against hand values, tables and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from rayrlhf.algorithms.losses import (
    causal_lm_loss,
    kl_loss,
    negative_log_likelihood,
    ppo_policy_loss,
    ppo_value_loss,
)

NAN = float("nan")


def policy_loss_of(ratio: float, advantage: float, dual_clip: float | None = None) -> Tensor:
    """Return (loss, d loss / d log_prob) for one token."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, _ = ppo_policy_loss(
        log_probs,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([[advantage]], dtype=torch.float64),
        torch.ones(1, 1),
        clip=0.2,
        dual_clip=dual_clip,
    )
    (grad,) = torch.autograd.grad(loss, log_probs)
    return torch.stack([loss.detach(), grad.squeeze()])


def test_causal_lm_loss_is_the_cross_entropy_of_aligned_labels() -> None:
    logits, labels = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    wanted = -sum(
        logits[b, t].log_softmax(0)[labels[b, t]].item()
        for b in range(2)
        for t in range(4)
        if mask[b, t]
    )
    loss, metrics = causal_lm_loss(logits, labels, mask)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert metrics["loss"] == loss
    log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(negative_log_likelihood(log_probs, mask)[0], loss)


def test_06_end_of_text_equal_to_pad_keeps_its_loss_and_gradient() -> None:
    eos = pad = 0
    labels = torch.tensor([[3, eos, pad]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])  # from lengths, not from comparing ids
    logits = torch.randn(1, 3, 5, requires_grad=True)
    causal_lm_loss(logits, labels, mask)[0].backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().sum() > 0
    assert (logits.grad[0, 2] == 0).all()


def test_causal_lm_loss_accepts_ignored_ids_under_mask_0() -> None:
    logits, mask = torch.randn(1, 2, 5), torch.tensor([[1.0, 0.0]])
    loss = causal_lm_loss(logits, torch.tensor([[2, -100]]), mask)[0]
    assert loss.item() == pytest.approx(-logits[0, 0].log_softmax(0)[2].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),  # good token, already likelier: no more push
        (0.5, 2.0, -1.0, False),  # good token, made rarer: full push back
        (1.5, -2.0, 3.0, False),  # bad token, made likelier: full push back
        (0.5, -2.0, 1.6, True),  # bad token, already rarer: no more push
        (1.1, -2.0, 2.2, False),
        (0.9, 0.0, 0.0, True),
    ],
)
def test_26_clipped_surrogate_takes_the_pessimistic_side(
    ratio: float, advantage: float, wanted: float, clipped: bool
) -> None:
    loss, grad = policy_loss_of(ratio, advantage)
    assert loss.item() == pytest.approx(wanted)
    assert grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_26_dual_clip_acts_on_bad_tokens_only() -> None:
    loss, grad = policy_loss_of(10.0, -2.0, dual_clip=3.0)
    assert (loss.item(), grad.item()) == (6.0, 0.0)
    assert policy_loss_of(2.0, -2.0, dual_clip=3.0)[0].item() == pytest.approx(4.0)
    assert torch.equal(policy_loss_of(0.1, 2.0, dual_clip=3.0), policy_loss_of(0.1, 2.0))
    assert torch.equal(policy_loss_of(10.0, 2.0, dual_clip=3.0), policy_loss_of(10.0, 2.0))
    with pytest.raises(ValueError, match="above 1"):
        policy_loss_of(1.0, 1.0, dual_clip=0.5)


def test_policy_metrics_are_sums_over_valid_tokens() -> None:
    log_probs = torch.log(torch.tensor([[1.0, 1.5, 0.5], [1.1, 9.0, 9.0]]))
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss, metrics = ppo_policy_loss(log_probs, torch.zeros(2, 3), torch.ones(2, 3), mask, clip=0.2)
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.1])
    assert loss.item() == pytest.approx(-(1.0 + 1.2 + 0.5 + 1.1))
    assert metrics["policy/clip_fraction"] == 2
    assert metrics["policy/ratio"].item() == pytest.approx(4.1)
    torch.testing.assert_close(
        metrics["policy/approx_kl"], (ratios - 1 - ratios.log()).sum(), atol=1e-6, rtol=1e-5
    )


def test_14_equal_log_probs_give_ratio_1_and_no_clipping() -> None:
    log_probs = torch.randn(3, 4)
    mask = torch.ones(3, 4)
    advantages = torch.randn(3, 4)
    loss, metrics = ppo_policy_loss(log_probs, log_probs.clone(), advantages, mask, clip=0.2)
    assert metrics["policy/ratio"] == 12
    assert metrics["policy/clip_fraction"] == metrics["policy/approx_kl"] == 0
    torch.testing.assert_close(loss, -advantages.sum())


# exp(80) still fits into float32, its square does not; exp(1000) does not either.
@pytest.mark.parametrize("log_ratio", [80.0, -80.0, 1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_17_log_ratio_of_80_gives_finite_loss_and_gradient(
    log_ratio: float, advantage: float
) -> None:
    log_probs = torch.full((1, 1), log_ratio, requires_grad=True)
    loss, metrics = ppo_policy_loss(
        log_probs, torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1), clip=0.2
    )
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert loss.square().isfinite()
    assert grad.square().isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def value_loss_at(value: float, old: float, target: float) -> Tensor:
    x = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    loss, metrics = ppo_value_loss(
        x,
        torch.tensor([[old]], dtype=torch.float64),
        torch.tensor([[target]], dtype=torch.float64),
        torch.ones(1, 1),
        clip=0.2,
    )
    (grad,) = torch.autograd.grad(loss, x)
    return torch.stack([loss.detach(), grad.squeeze(), metrics["value/clip_fraction"].double()])


@pytest.mark.parametrize(
    ("value", "old", "target", "wanted", "clipped"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, 0),  # within the range: plain squared error
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 1),  # moved far towards the target: clipped, no gradient
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, 0),  # moved away: the larger, unclipped error counts
        (0.1, 1.0, 0.0, 0.5 * 0.8**2, 1),
    ],
)
def test_27_value_clip_is_around_old_values_and_takes_the_larger_error(
    value: float, old: float, target: float, wanted: float, clipped: int
) -> None:
    loss, grad, fraction = value_loss_at(value, old, target)
    assert loss.item() == pytest.approx(wanted)
    assert fraction.item() == clipped
    step = 1e-6
    numeric = (
        value_loss_at(value + step, old, target)[0] - value_loss_at(value - step, old, target)[0]
    ) / (2 * step)
    assert grad.item() == pytest.approx(numeric.item(), abs=1e-6)
    assert (grad.item() == 0) == bool(clipped)


def batch(rows: int = 8, T: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tensors = [0.3 * torch.randn(rows, T, generator=generator) for _ in range(3)]
    lengths = torch.tensor([6, 1, 3, 5, 2, 0, 4, 6])
    return (*tensors, (torch.arange(T) < lengths[:, None]).float())


@pytest.mark.parametrize(("num_ranks", "num_micro"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_31_gradient_does_not_depend_on_how_the_batch_is_split(
    num_ranks: int, num_micro: int, kind: str
) -> None:
    def gradient(parts: int) -> Tensor:
        x, other, third, mask = batch()
        weight = torch.tensor(0.7, requires_grad=True)
        denominator = mask.sum()
        for rows in torch.arange(8).chunk(parts):
            loss = ppo_policy_loss if kind == "policy" else ppo_value_loss
            loss_sum, _ = loss(weight * x[rows], other[rows], third[rows], mask[rows], clip=0.2)
            (loss_sum / denominator).backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(num_ranks * num_micro), gradient(1))


@pytest.mark.parametrize("junk", [NAN, float("inf"), 1e30])
def test_31_padding_and_empty_masks_give_zero_not_nan(junk: float) -> None:
    x, other, third, mask = batch()
    dirty = [t.masked_fill(mask == 0, junk) for t in (x, other, third)]
    for loss in (ppo_policy_loss, ppo_value_loss):
        clean_sum, clean_metrics = loss(x, other, third, mask, clip=0.2)
        leaf = dirty[0].clone().requires_grad_()
        loss_sum, metrics = loss(leaf, dirty[1], dirty[2], mask, clip=0.2)
        assert torch.equal(loss_sum, clean_sum)
        assert all(torch.equal(metrics[name], clean_metrics[name]) for name in metrics)
        (grad,) = torch.autograd.grad(loss_sum, leaf)
        assert (grad[mask == 0] == 0).all()
        assert grad.isfinite().all()
        empty, empty_metrics = loss(leaf, dirty[1], dirty[2], torch.zeros_like(mask), clip=0.2)
        assert empty == 0
        assert all(value == 0 for value in empty_metrics.values())
        assert (torch.autograd.grad(empty, leaf)[0] == 0).all()


def test_03_kl_loss_is_k3_and_pulls_towards_the_reference() -> None:
    # log-ratios ln 2 and -ln 2: k3 = exp(-r) - 1 + r = ln 2 - 0.5 and 1 - ln 2; padding is not read
    ln2 = math.log(2)
    log_probs = torch.tensor([[-1.0, -1.0, float("nan")]], requires_grad=True)
    ref = torch.tensor([[-1.0 - ln2, -1.0 + ln2, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    loss, metrics = kl_loss(log_probs, ref, mask)
    assert loss.item() == pytest.approx(0.5)
    assert metrics["policy/kl_loss"].item() == pytest.approx(0.5)
    loss.backward()
    assert log_probs.grad is not None
    # d k3 / d log p = 1 - exp(-r)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.5, -1.0, 0.0]]))
    weighted, same = kl_loss(log_probs.detach(), ref, mask, weights=torch.tensor([[3.0]]))
    assert weighted.item() == pytest.approx(1.5)
    assert same["policy/kl_loss"].item() == pytest.approx(0.5)
