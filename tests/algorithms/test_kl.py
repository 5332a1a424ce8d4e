"""KL estimators, coefficient controllers and importance weights."""

import math
from typing import Literal

import pytest
import torch

from rayrlhf.algorithms.kl import (
    AdaptiveKLController,
    FixedKLController,
    importance_weights,
    kl_estimate,
    make_kl_controller,
)

MODES: tuple[Literal["token", "token_mask", "sequence", "sequence_mask"], ...] = (
    "token",
    "token_mask",
    "sequence",
    "sequence_mask",
)


def test_02_k1_is_zero_for_equal_models_and_sums_to_the_sequence_log_ratio() -> None:
    log_probs = torch.randn(3, 5)
    ref = torch.randn(3, 5)
    assert torch.equal(kl_estimate(log_probs, log_probs), torch.zeros(3, 5))
    torch.testing.assert_close(
        kl_estimate(log_probs, ref).sum(dim=1), log_probs.sum(dim=1) - ref.sum(dim=1)
    )


def test_estimators_by_hand() -> None:
    policy, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    log2 = math.log(2)
    assert kl_estimate(policy, ref).item() == pytest.approx(log2)
    assert kl_estimate(policy, ref, estimator="k2").item() == pytest.approx(log2**2 / 2)
    assert kl_estimate(policy, ref, estimator="k3").item() == pytest.approx(0.5 - 1 + log2)


def test_03_monte_carlo_means_of_k1_and_k3_match_the_analytic_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(6, generator=generator).log_softmax(0)
    ref = (policy + 0.4 * torch.randn(6, generator=generator)).log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    tokens = torch.multinomial(policy.exp(), 400_000, replacement=True, generator=generator)
    for estimator in ("k1", "k3"):
        estimate = kl_estimate(policy[tokens], ref[tokens], estimator=estimator).mean()
        torch.testing.assert_close(estimate, exact, atol=2e-3, rtol=0)
    assert (kl_estimate(policy, ref, estimator="k3") >= 0).all()


def test_03_expected_gradient_of_k2_is_that_of_the_kl() -> None:
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], requires_grad=True)
    ref = torch.tensor([0.1, 0.2, -0.5, 0.4]).log_softmax(0)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - ref)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    log_probs = logits.log_softmax(0)
    # The expectation over tokens, with the sampling probabilities held fixed as in a rollout.
    k2 = (log_probs.exp().detach() * kl_estimate(log_probs, ref, estimator="k2")).sum()
    torch.testing.assert_close(torch.autograd.grad(k2, logits)[0], wanted)
    k3 = (log_probs.exp().detach() * kl_estimate(logits.log_softmax(0), ref, estimator="k3")).sum()
    assert not torch.allclose(torch.autograd.grad(k3, logits)[0], wanted, atol=1e-3)


@pytest.mark.parametrize("log_ratio", [80.0, 1000.0])
def test_17_log_ratio_of_80_stays_finite(log_ratio: float) -> None:
    log_probs = torch.tensor([-log_ratio], requires_grad=True)
    k3 = kl_estimate(log_probs, torch.zeros(1), estimator="k3").sum()
    k3.backward()
    assert k3.square().isfinite()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), estimator="k4")  # type: ignore[arg-type]


def test_34_adaptive_coefficient_moves_the_right_way_with_clipped_error() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    controller.update(6.6, num_responses=10)  # 10% too high: 1 + 0.1 * 10 / 100
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(6000.0, num_responses=10)  # clipped to +0.2
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, num_responses=10)  # clipped to -0.2
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
    controller.update(6.0, num_responses=10)  # on target
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)


def test_34_coefficient_is_all_the_state_there_is() -> None:
    whole, first = (AdaptiveKLController(0.1, target=6.0, horizon=100) for _ in range(2))
    for kl in (9.0, 3.0, 6.5, 1.0):
        whole.update(kl, num_responses=8)
    for kl in (9.0, 3.0):
        first.update(kl, num_responses=8)
    resumed = AdaptiveKLController(first.coef, target=6.0, horizon=100)
    for kl in (6.5, 1.0):
        resumed.update(kl, num_responses=8)
    assert resumed.coef == whole.coef


def test_34_simulated_kl_settles_at_the_target() -> None:
    controller = AdaptiveKLController(0.5, target=4.0, horizon=500)
    for _ in range(300):
        controller.update(1 / controller.coef, num_responses=64)  # a policy that obeys the penalty
    assert 1 / controller.coef == pytest.approx(4.0, rel=1e-3)


def test_34_coefficient_never_turns_negative() -> None:
    controller = AdaptiveKLController(0.5, target=4.0, horizon=1)
    controller.update(0.0, num_responses=64)
    assert controller.coef == 0


def test_controllers_are_chosen_by_the_target() -> None:
    fixed = make_kl_controller(0.02, None, 100)
    fixed.update(50.0, num_responses=64)
    assert isinstance(fixed, FixedKLController)
    assert fixed.coef == 0.02
    assert isinstance(make_kl_controller(0.02, 6.0, 100), AdaptiveKLController)
    adaptive = make_kl_controller(0.02, 6.0, 100)
    for no_number in (math.nan, math.inf):
        adaptive.update(no_number, 8)
    assert adaptive.coef == 0.02
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKLController(0.1, target=0.0, horizon=100)


@pytest.mark.parametrize("mode", MODES)
def test_37_importance_weights_never_exceed_the_cap(
    mode: Literal["token", "token_mask", "sequence", "sequence_mask"],
) -> None:
    generator = torch.Generator().manual_seed(1)
    new, old = (5 * torch.randn(50, 7, generator=generator) for _ in range(2))
    new[0, 0], old[0, 0] = 80.0, -80.0
    mask = (torch.arange(7) < torch.arange(50)[:, None] % 8).float()
    weights = importance_weights(new.requires_grad_(), old, mask, cap=2.0, mode=mode)
    assert weights.max() <= 2
    assert weights.min() >= 0
    assert (weights[mask == 0] == 0).all()
    assert not weights.requires_grad


def test_37_importance_weights_by_hand() -> None:
    new = torch.tensor([[math.log(3.0), math.log(0.5), float("nan")]])
    old, mask = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    wanted = {
        "token": [2.0, 0.5, 0.0],
        "token_mask": [0.0, 0.5, 0.0],
        "sequence": [1.5, 1.5, 0.0],
        "sequence_mask": [1.5, 1.5, 0.0],
    }
    for mode in MODES:
        weights = importance_weights(new, old, mask, cap=2.0, mode=mode)
        torch.testing.assert_close(weights, torch.tensor([wanted[mode]]))
    with pytest.raises(ValueError, match="above 0"):
        importance_weights(new, old, mask, cap=0.0)
    with pytest.raises(ValueError, match="token_mask"):
        importance_weights(new, old, mask, cap=1.0, mode="word")  # type: ignore[arg-type]
