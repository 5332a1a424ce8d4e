"""Credit assignment against hand-worked numbers and naive references."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

NAN = float("nan")


def naive_gae(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """Sum (gamma lambda)^l delta_(t+l) for every t: O(T^2), straight from the definition."""
    T = len(rewards)
    next_values = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * next_values[t] - values[t] for t in range(T)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, T)) for t in range(T)]


def ragged_mask(lengths: list[int], T: int) -> Tensor:
    return (torch.arange(T) < torch.tensor(lengths)[:, None]).float()


def test_05_score_lands_on_the_last_generated_token() -> None:
    mask = ragged_mask([3, 5, 1, 0], 5)
    rewards = token_rewards(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 5), mask, kl_coef=0.1
    )
    wanted = torch.zeros(4, 5)
    wanted[0, 2], wanted[1, 4], wanted[2, 0] = 1, 2, 3
    assert torch.equal(rewards, wanted)


def test_05_kl_penalty_is_on_every_token_and_padding_is_not_read() -> None:
    kl = torch.tensor([[0.5, -1.0, NAN], [2.0, NAN, NAN]])
    rewards = token_rewards(torch.tensor([1.0, -1.0]), kl, ragged_mask([2, 1], 3), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.1, 0.0], [-1.2, 0.0, 0.0]]))


def test_05_score_goes_to_the_last_token_when_the_response_has_a_gap() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    rewards = token_rewards(torch.tensor([7.0]), torch.zeros(1, 4), mask, kl_coef=1.0)
    assert rewards.tolist() == [[0.0, 0.0, 7.0, 0.0]]


def test_25_clip_is_of_the_score_and_leaves_the_kl_penalty_whole() -> None:
    scores = clip_scores(torch.tensor([50.0, -0.5]), clip=1.0)
    assert scores.tolist() == [1.0, -0.5]
    rewards = token_rewards(scores, torch.full((2, 1), 30.0), torch.ones(2, 1), kl_coef=1.0)
    assert rewards.tolist() == [[-29.0], [-30.5]]
    untouched = torch.tensor([50.0])
    assert torch.equal(clip_scores(untouched, clip=None), untouched)


def test_18_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2), gamma=0.9, gae_lambda=0.5)
    # delta_1 = 1 - 0.25 = 0.75 (V after the end is 0); delta_0 = 0.9 * 0.25 - 0.5 = -0.275
    # A_0 = -0.275 + 0.45 * 0.75 = 0.0625
    torch.testing.assert_close(advantages, torch.tensor([[0.0625, 0.75]]))
    torch.testing.assert_close(returns, torch.tensor([[0.5625, 1.0]]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
)
def test_18_gae_matches_the_definition(
    seed: int, lengths: list[int], gamma: float, gae_lambda: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(len(lengths), 7, generator=generator) for _ in range(2))
    advantages, returns = gae(
        rewards, values, ragged_mask(lengths, 7), gamma=gamma, gae_lambda=gae_lambda
    )
    for row, length in enumerate(lengths):
        wanted = naive_gae(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, gae_lambda
        )
        padded = torch.tensor(wanted + [0.0] * (7 - length))
        torch.testing.assert_close(advantages[row], padded, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(returns[row, :length], padded[:length] + values[row, :length])


def test_18_without_discount_the_advantage_is_return_minus_value() -> None:
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    advantages, returns = gae(rewards, values, torch.ones(3, 6), gamma=1.0, gae_lambda=1.0)
    reward_to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, reward_to_go - values)
    torch.testing.assert_close(returns, reward_to_go)


@pytest.mark.parametrize("junk", [100.0, NAN, float("inf")])
def test_19_gae_ignores_padding(junk: float) -> None:
    mask = ragged_mask([4, 2], 6)
    rewards, values = torch.randn(2, 6), torch.randn(2, 6)
    clean = gae(rewards * mask, values * mask, mask, gamma=0.99, gae_lambda=0.95)
    dirty = gae(
        rewards.masked_fill(mask == 0, junk),
        values.masked_fill(mask == 0, junk),
        mask,
        gamma=0.99,
        gae_lambda=0.95,
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (b[mask == 0] == 0).all()


@pytest.mark.parametrize("num_inserted", [1, 3])
def test_20_gae_crosses_masked_tokens_without_decay(num_inserted: int) -> None:
    rewards, values = torch.randn(1, 5), torch.randn(1, 5)
    plain, plain_returns = gae(rewards, values, torch.ones(1, 5), gamma=0.9, gae_lambda=0.95)

    def insert(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x[:, :2], torch.full((1, num_inserted), fill), x[:, 2:]], dim=1)

    mask = insert(torch.ones(1, 5), 0.0)
    advantages, returns = gae(
        insert(rewards, 9.0), insert(values, 9.0), mask, gamma=0.9, gae_lambda=0.95
    )
    assert torch.equal(advantages[mask.bool()], plain[0])
    assert torch.equal(returns[mask.bool()], plain_returns[0])


def test_21_returns_are_advantages_plus_values_whatever_whitening_does() -> None:
    rewards, values, mask = torch.randn(4, 6), torch.randn(4, 6), ragged_mask([6, 3, 1, 5], 6)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    before = returns.clone()
    whiten(advantages, mask)
    assert torch.equal(returns, before)
    assert torch.equal(returns, (advantages + values) * mask)


def test_22_whitened_advantages_have_mean_0_and_std_1_over_the_mask() -> None:
    mask = ragged_mask([6, 3, 1, 5], 6)
    x = (3 * torch.randn(4, 6) + 5).masked_fill(mask == 0, NAN)
    valid = whiten(x, mask)[mask.bool()]
    torch.testing.assert_close(valid.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(valid.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_22_whitening_by_hand() -> None:
    # values 0, 2, 4: mean 2, variance 8 / 3
    x, mask = torch.tensor([[0.0, 2.0], [4.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    edge = 2 / (8 / 3) ** 0.5
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-edge, 0.0], [edge, 0.0]]))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_22_ranks_get_shards_of_the_whitened_global_batch(num_ranks: int) -> None:
    mask = ragged_mask([6, 3, 1, 5], 6)
    x = torch.randn(4, 6) * torch.tensor([[1.0], [5.0], [0.1], [2.0]])
    shards = torch.cat(list(whiten(x, mask).chunk(num_ranks)))
    assert torch.equal(shards, whiten(x, mask))
    # The wrong way, moments per rank, gives something else: the order of operations matters.
    per_rank = torch.cat(
        [whiten(a, m) for a, m in zip(x.chunk(num_ranks), mask.chunk(num_ranks), strict=True)]
    )
    assert torch.allclose(per_rank, shards) == (num_ranks == 1)


def test_22_whitening_of_constants_and_of_nothing_is_zero() -> None:
    assert torch.equal(whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)), torch.zeros(2, 2))
    assert torch.equal(whiten(torch.full((2, 2), NAN), torch.zeros(2, 2)), torch.zeros(2, 2))


def test_23_reward_whitening_keeps_the_mean() -> None:
    mask = ragged_mask([6, 3, 1, 5], 6)
    x = 3 * torch.randn(4, 6) + 5
    out = whiten(x, mask, shift_mean=False)
    valid = mask.bool()
    torch.testing.assert_close(out[valid].mean(), x[valid].mean())
    torch.testing.assert_close(out[valid].std(correction=0), torch.tensor(1.0))
    assert (out[~valid] == 0).all()


def test_36_group_relative_by_hand() -> None:
    # group (1, 3): mean 2, sample std sqrt(2); group (5, 5): no signal
    advantages = group_relative(torch.tensor([1.0, 3.0, 5.0, 5.0]), samples_per_prompt=2)
    torch.testing.assert_close(advantages, torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0, 0.0]))


def test_36_leave_one_out_by_hand() -> None:
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 6.0]), samples_per_prompt=3)
    torch.testing.assert_close(advantages, torch.tensor([1 - 4, 2 - 3.5, 6 - 1.5]))


@pytest.mark.parametrize("estimate", [group_relative, leave_one_out])
def test_36_group_estimators_survive_shuffling_and_equal_scores(
    estimate: Callable[..., Tensor],
) -> None:
    scores, ids = torch.randn(12), torch.arange(4).repeat_interleave(3)
    plain = estimate(scores, samples_per_prompt=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = estimate(scores[order], samples_per_prompt=3, group_ids_B=ids[order])
    torch.testing.assert_close(shuffled, plain[order])
    no_signal = estimate(torch.full((6,), 0.1), samples_per_prompt=3)
    torch.testing.assert_close(no_signal, torch.zeros(6), atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="samples_per_prompt=2 or more"):
        estimate(scores, samples_per_prompt=1)
    with pytest.raises(ValueError, match="whole groups"):
        estimate(scores, samples_per_prompt=5)
    with pytest.raises(ValueError, match="whole groups"):
        estimate(scores, samples_per_prompt=3, group_ids_B=torch.arange(12) % 3)


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 4), 7.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(1, 4), mask) == 0


def test_36_group_relative_without_the_standard_deviation() -> None:
    scores = torch.tensor([1.0, 3.0, 10.0, 0.0])
    found = group_relative(scores, samples_per_prompt=2, divide_by_std=False)
    assert found.tolist() == [-1.0, 1.0, 5.0, -5.0]


def test_discounted_returns_by_hand() -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, NAN, 8.0]])
    found = discounted_returns(rewards, mask, gamma=0.5)
    # 1 + 0.5 * (2 + 0.5 * 4); what is masked neither counts nor decays
    assert found.tolist() == [[3.0, 4.0, 4.0], [5.0, 0.0, 8.0]]
