"""Losses of the reward model on pairs of responses to one prompt.

    pairs = ranked_pairs(...) or judged_pairs(...)     who should be above whom, and how surely
    pairs = weighted(pairs, per="prompt" | "pair")     InstructGPT's K-wise loss, or Bradley-Terry's
    loss_sum, sums = pair_loss(scores, pairs)          K scores of a prompt, whatever its pairs

The scores are computed once per response, never once per pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """M pairs of responses, each pair once; `first` is the better one where there is a better."""

    first: Tensor
    """(M,) int64, position among the scores"""
    second: Tensor
    """(M,) int64"""
    target: Tensor
    """(M,) float32, chance that `first` is preferred; 1 where it is ranked above, 0.5 for a tie"""
    margin: Tensor
    """(M,) float32, by how much the score of `first` should be the higher one, at least"""
    ranked: Tensor
    """(M,) float32, 1 where the ranks tell the two apart; only those count for the accuracy"""
    weight: Tensor
    """(M,) float32, of the pair in the sum"""

    def to(self, device: torch.device) -> Self:
        """Return a copy on `device`."""
        return replace(self, **{f.name: self.__dict__[f.name].to(device) for f in fields(self)})


def ranked_pairs(
    ranks_N: Tensor,
    group_ids_N: Tensor,
    *,
    ties: Literal["ignore", "half"] = "ignore",
    ratings_N: Tensor | None = None,
    margin_scale: float = 0.0,
) -> Pairs:
    """Return the pairs of responses to one prompt, the one with the lower rank first.

    `ranks_N` are ranks (1 = best) within the prompt of `group_ids_N`; responses of a prompt may
    stand anywhere, but must all be there. Equal ranks give no pair, or with ties="half" one with a
    target of 0.5. The margin is `margin_scale` times the gap of `ratings_N` (higher is better;
    None: of the ranks), and 0 for a tie.
    """
    above = ranks_N.unsqueeze(1) < ranks_N.unsqueeze(0)  # (N, N), row beats column
    if ties == "half":
        tied = ranks_N.unsqueeze(1) == ranks_N.unsqueeze(0)
        above = above | tied.triu(diagonal=1)
    same_group = group_ids_N.unsqueeze(1) == group_ids_N.unsqueeze(0)
    first, second = (same_group & above).nonzero(as_tuple=True)  # (M,) each
    ranked = (ranks_N[first] != ranks_N[second]).float()
    values = -ranks_N.float() if ratings_N is None else ratings_N
    gap = (values[first] - values[second]).clamp(min=0.0)
    margin = margin_scale * gap * ranked
    return Pairs(first, second, 0.5 + 0.5 * ranked, margin, ranked, torch.ones_like(ranked))


def judged_pairs(ranks_K: Tensor, judgements: Sequence[Sequence[float]]) -> Pairs:
    """Return all pairs of one prompt's K responses, with the share of people's judgements.

    `judgements[k]` are single people's ratings of response k. The target is the chance that a
    rating of `first`, drawn at random, is above one of `second`, equal ones half; so the
    cross-entropy is the mean loss over all pairs of single judgements.
    """
    values = torch.tensor([value for one in judgements for value in one], dtype=torch.float64)
    counts = torch.tensor([len(one) for one in judgements])
    owner = torch.arange(len(judgements)).repeat_interleave(counts)
    share = F.one_hot(owner, len(judgements)).double() / counts  # (R, K)
    above = 0.5 + 0.5 * torch.sign(values.unsqueeze(1) - values.unsqueeze(0))  # (R, R)
    chance = share.T @ above @ share  # (K, K), row above column
    better_first = torch.argsort(ranks_K, stable=True)
    first, second = better_first[torch.triu_indices(len(counts), len(counts), 1)]
    ranked = (ranks_K[first] != ranks_K[second]).float()
    return Pairs(
        first, second, chance[first, second].float(), ranked * 0, ranked, torch.ones_like(ranked)
    )


def weighted(pairs: Pairs, group_ids_N: Tensor, *, per: Literal["prompt", "pair"]) -> Pairs:
    """Return the pairs with weights: every prompt (K-wise) or every pair has the same in all."""
    if per == "pair":
        return pairs
    groups, group_of = torch.unique(group_ids_N, return_inverse=True)
    num_pairs = torch.bincount(group_of[pairs.first], minlength=groups.shape[0])  # (num_groups,)
    return replace(pairs, weight=1.0 / num_pairs[group_of[pairs.first]])


def pair_loss(
    scores_N: Tensor, pairs: Pairs, *, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the weighted cross-entropy of sigmoid(r_first - r_second - margin) against the target.

    `center_coef` times the squared sum of a pair's scores is added, which keeps their mean near 0
    (arXiv:2312.09244). Metrics are sums: `reward/loss`, and of the pairs that ranks tell
    apart `reward/num_pairs` and `reward/num_correct` (equal scores count half).
    Source: arXiv:2203.02155, eq. 1; the margin: arXiv:2307.09288, eq. 2.
    """
    first, second = scores_N[pairs.first], scores_N[pairs.second]
    difference = first - second  # (M,)
    logits = difference - pairs.margin
    losses = -pairs.target * F.logsigmoid(logits) - (1.0 - pairs.target) * F.logsigmoid(-logits)
    if center_coef > 0:
        losses = losses + center_coef * (first + second) ** 2
    loss = (losses * pairs.weight).sum()
    correct = (difference > 0).float() + 0.5 * (difference == 0).float()
    return loss, {
        "reward/loss": loss.detach(),
        "reward/num_pairs": pairs.ranked.sum(),
        "reward/num_correct": (correct * pairs.ranked).detach().sum(),
    }


def ranking_loss(
    scores_N: Tensor, ranks_N: Tensor, group_ids_N: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over prompts the mean of -log sigmoid(r_better - r_worse) over the prompt's pairs.

    The K-wise loss of InstructGPT: `scores_N` are the rewards of N responses; ties give no pair; a
    prompt with nothing but ties adds 0. To the metrics of `pair_loss` comes `reward/num_groups`
    with at least one pair. Source: arXiv:2203.02155, eq. 1.
    """
    pairs = weighted(ranked_pairs(ranks_N, group_ids_N), group_ids_N, per="prompt")
    loss, sums = pair_loss(scores_N, pairs)
    num_groups = torch.unique(group_ids_N[pairs.first]).numel()
    return loss, {**sums, "reward/num_groups": torch.tensor(float(num_groups))}


def joined(parts: Sequence[Pairs], offsets: Sequence[int]) -> Pairs:
    """Return the pairs of several prompts as one, each prompt's positions moved by its offset."""
    moved = [
        replace(part, first=part.first + offset, second=part.second + offset)
        for part, offset in zip(parts, offsets, strict=True)
    ]
    return Pairs(*(torch.cat([p.__dict__[f.name] for p in moved]) for f in fields(Pairs)))
