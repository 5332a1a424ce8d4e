"""The K-wise ranking loss of the reward model."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ranking_loss(
    scores_N: Tensor, ranks_N: Tensor, group_ids_N: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over prompts the mean of -log sigmoid(r_better - r_worse) over the prompt's pairs.

    `scores_N` are the rewards of N responses, `ranks_N` their ranks (1 = best) within the prompt
    of `group_ids_N`; responses of a prompt may stand anywhere, but must all be there. Ties give
    no pair; a prompt with nothing but ties adds 0.

    Metrics are sums too: `reward/num_groups` with at least one pair, `reward/num_pairs`, and
    `reward/num_correct` pairs that the scores order as people did (equal scores count half).
    Source: arXiv:2203.02155, eq. 1.
    """
    same_group = group_ids_N.unsqueeze(1) == group_ids_N.unsqueeze(0)  # (N, N)
    better = same_group & (ranks_N.unsqueeze(1) < ranks_N.unsqueeze(0))  # row beats column
    winner, loser = better.nonzero(as_tuple=True)  # (num_pairs,) each
    groups, group_of = torch.unique(group_ids_N, return_inverse=True)
    num_pairs = torch.bincount(group_of[winner], minlength=groups.shape[0])  # (num_groups,)
    difference = scores_N[winner] - scores_N[loser]
    loss = (-F.logsigmoid(difference) / num_pairs[group_of[winner]]).sum()
    correct = (difference > 0).float() + 0.5 * (difference == 0).float()
    return loss, {
        "reward/loss": loss.detach(),
        "reward/num_groups": (num_pairs > 0).sum().float(),
        "reward/num_pairs": num_pairs.sum().float(),
        "reward/num_correct": correct.detach().sum(),
    }
