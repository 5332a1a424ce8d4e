"""The ranking loss of the reward model."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.algorithms.ranking import (
    joined,
    judged_pairs,
    pair_loss,
    ranked_pairs,
    ranking_loss,
    weighted,
)


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


def loops(scores: list[float], ranks: list[int], groups: list[int], **options: Any) -> list[float]:
    """Return the loss of each pair with a rank order, or a tie, straight from the formulas."""
    found = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        if groups[i] != groups[j] or (ranks[i] == ranks[j] and options["ties"] == "ignore"):
            continue
        first, second = (i, j) if ranks[i] <= ranks[j] else (j, i)
        values = options.get("ratings") or [-rank for rank in ranks]
        margin = max(0.0, values[first] - values[second]) * options["scale"]
        gap = scores[first] - scores[second]
        if ranks[i] == ranks[j]:
            loss = 0.5 * math.log1p(math.exp(-gap)) + 0.5 * math.log1p(math.exp(gap))
        else:
            loss = math.log1p(math.exp(-(gap - margin)))
        found.append(loss + options["center"] * (scores[first] + scores[second]) ** 2)
    return found


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    ties=st.sampled_from(["ignore", "half"]),
    rated=st.booleans(),
    scale=st.sampled_from([0.0, 0.5]),
    center=st.sampled_from([0.0, 0.1]),
)
def test_every_pair_weighs_the_same_with_ties_margin_and_centring(
    data: st.DataObject, ties: Any, rated: bool, scale: float, center: float
) -> None:
    size = data.draw(st.integers(1, 10))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    ratings = [-1.5 * rank for rank in ranks] if rated else None
    scores = torch.randn(size, generator=torch.Generator().manual_seed(size))
    pairs = ranked_pairs(
        torch.tensor(ranks),
        torch.tensor(groups),
        ties=ties,
        ratings_N=None if ratings is None else torch.tensor(ratings),
        margin_scale=scale,
    )
    pairs = weighted(pairs, torch.tensor(groups), per="pair")
    loss, metrics = pair_loss(scores, pairs, center_coef=center)
    wanted = loops(
        scores.tolist(), ranks, groups, ties=ties, ratings=ratings, scale=scale, center=center
    )
    assert len(pairs.first) == len(wanted)
    assert loss.item() == pytest.approx(sum(wanted), rel=1e-4, abs=1e-5)
    # What is right or wrong has to do with neither ties nor margins.
    plain = ranking_loss(scores, torch.tensor(ranks), torch.tensor(groups))[1]
    for name in ("reward/num_pairs", "reward/num_correct"):
        assert metrics[name] == plain[name]


def test_llama_2s_margin_by_hand() -> None:
    """Ratings 3 and 1: a gap of 2, a third each; scores 1 and 0: -log sigmoid(1 - 2/3)."""
    pairs = ranked_pairs(
        torch.tensor([2, 1]),
        torch.tensor([0, 0]),
        ratings_N=torch.tensor([1.0, 3.0]),
        margin_scale=1 / 3,
    )
    loss, _ = pair_loss(torch.tensor([0.0, 1.0]), pairs)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1 / 3)))


def test_a_tie_pulls_two_scores_together() -> None:
    scores = torch.tensor([2.0, 0.0], requires_grad=True)
    pairs = ranked_pairs(torch.tensor([1, 1]), torch.tensor([0, 0]), ties="half")
    loss, metrics = pair_loss(scores, pairs)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (math.log1p(math.e**2) + math.log1p(math.e**-2)))
    assert scores.grad is not None
    assert scores.grad[0] == -scores.grad[1] == pytest.approx(1 / (1 + math.e**-2) - 0.5)
    assert metrics["reward/num_pairs"] == 0


def test_judgements_by_hand() -> None:
    """Ratings (1, 3) against (2, 3): of four pairs one is above, one equal: 3/8 and 5/8."""
    pairs = judged_pairs(torch.tensor([2, 1]), [[1, 3], [2, 3]])
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([1], [0])
    assert pairs.target.tolist() == [5 / 8]
    loss, _ = pair_loss(torch.tensor([0.0, 1.0]), pairs)
    wanted = 5 / 8 * math.log1p(math.exp(-1)) + 3 / 8 * math.log1p(math.exp(1))
    assert loss.item() == pytest.approx(wanted)


def test_shares_of_judgements_are_the_loss_over_all_pairs_of_single_ones() -> None:
    """An independent way: every single judgement is a response of its own, ties half."""
    rng = random.Random(0)
    judgements = [[rng.randint(-2, 2) for _ in range(n)] for n in (3, 5, 2, 4)]
    means = [sum(one) / len(one) for one in judgements]
    ranks = torch.tensor([1 + sum(other > mean for other in means) for mean in means])
    scores = torch.randn(4, generator=torch.Generator().manual_seed(0))
    pairs = judged_pairs(ranks, judgements)
    assert len(pairs.first) == 6
    total = 0.0
    for i, j in itertools.combinations(range(4), 2):
        for a, b in itertools.product(judgements[i], judgements[j]):
            gap = float(scores[i] - scores[j]) * (1 if a > b else -1)
            one = math.log1p(math.exp(-gap))
            if a == b:
                one = 0.5 * one + 0.5 * math.log1p(math.exp(gap))
            total += one / (len(judgements[i]) * len(judgements[j]))
    assert pair_loss(scores, pairs)[0].item() == pytest.approx(total, rel=1e-5)


def test_pairs_of_prompts_are_joined_with_their_weights() -> None:
    ranks, groups = torch.tensor([1, 2, 3, 2, 1]), torch.tensor([0, 0, 0, 1, 1])
    scores = torch.randn(5, generator=torch.Generator().manual_seed(1))
    certain = [[[3.0], [2.0], [1.0]], [[1.0], [2.0]]]  # one rater each: the order of the ranks
    parts = [judged_pairs(ranks[:3], certain[0]), judged_pairs(ranks[3:], certain[1])]
    pairs = weighted(joined(parts, [0, 3]), groups, per="prompt")
    torch.testing.assert_close(pair_loss(scores, pairs)[0], ranking_loss(scores, ranks, groups)[0])
