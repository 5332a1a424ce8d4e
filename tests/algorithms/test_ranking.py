"""The ranking loss of the reward model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms.ranking import ranking_loss


def naive(scores: list[float], ranks: list[int], groups: list[int]) -> tuple[float, int, int]:
    """Loop over prompts and pairs, straight from InstructGPT's equation 1."""
    total, num_pairs, num_groups = 0.0, 0, 0
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        pairs = [(i, j) for i in members for j in members if ranks[i] < ranks[j]]
        if pairs:
            losses = [math.log1p(math.exp(-(scores[i] - scores[j]))) for i, j in pairs]
            total += sum(losses) / len(pairs)
            num_groups += 1
        num_pairs += len(pairs)
    return total, num_pairs, num_groups


def test_ranking_loss_by_hand() -> None:
    scores = torch.tensor([1.0, 0.0, 3.0, 5.0])
    loss, metrics = ranking_loss(scores, torch.tensor([1, 2, 3, 1]), torch.tensor([7, 7, 7, 9]))
    # prompt 7: pairs (1, 0), (1, 3), (0, 3); prompt 9 has one response and no pair
    pairs = [1.0 - 0.0, 1.0 - 3.0, 0.0 - 3.0]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-d)) for d in pairs) / 3)
    assert metrics["reward/num_pairs"] == 3
    assert metrics["reward/num_correct"] == 1
    assert metrics["reward/num_groups"] == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_ranking_loss_matches_loops(data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, 14))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    loss, metrics = ranking_loss(scores, torch.tensor(ranks), torch.tensor(groups))
    wanted, num_pairs, num_groups = naive(scores.tolist(), ranks, groups)
    assert loss.item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert metrics["reward/num_pairs"] == num_pairs
    assert metrics["reward/num_groups"] == num_groups


def test_groups_weigh_the_same_whatever_their_number_of_responses() -> None:
    scores = torch.zeros(2 + 9)
    ranks = torch.tensor([1, 2, *range(1, 10)])
    loss, _ = ranking_loss(scores, ranks, torch.tensor([0] * 2 + [1] * 9))
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_ties_are_left_out_and_only_ties_give_zero_with_gradient_zero() -> None:
    scores = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    loss, metrics = ranking_loss(scores, torch.tensor([2, 2, 2]), torch.zeros(3))
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert (scores.grad == 0).all()
    assert metrics["reward/num_groups"] == metrics["reward/num_pairs"] == 0


def test_gradient_raises_the_better_and_equal_scores_count_half() -> None:
    scores = torch.zeros(2, requires_grad=True)
    loss, metrics = ranking_loss(scores, torch.tensor([2, 1]), torch.tensor([0, 0]))
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.5, -0.5]
    assert metrics["reward/num_correct"] == 0.5


def test_31_loss_adds_up_over_micro_batches_of_whole_groups() -> None:
    scores, ranks = torch.randn(9), torch.tensor([1, 2, 3, 1, 1, 2, 3, 2, 1])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    whole = ranking_loss(scores, ranks, groups)[0]
    parts = [ranking_loss(scores[i:j], ranks[i:j], groups[i:j])[0] for i, j in ((0, 3), (3, 9))]
    torch.testing.assert_close(sum(parts), whole)
