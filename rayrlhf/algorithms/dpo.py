"""Direct preference optimization: the losses on ranked responses, without a reward model.

The implicit reward of a response is beta * (log pi - log pi_ref), summed over its tokens; of a
prompt's K responses every ordered pair counts, as for the reward model. Source: arXiv:2305.18290.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceLoss = Literal["sigmoid", "robust", "ipo", "plackett_luce"]


def dpo_loss(
    log_ratios_N: Tensor,
    ranks_N: Tensor,
    group_ids_N: Tensor,
    *,
    beta: float,
    loss: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over prompts the mean loss of the prompt's pairs, or the loss of its whole ranking.

    `log_ratios_N` is log pi(y|x) - log pi_ref(y|x) of N responses, summed over tokens; `ranks_N`
    (1 = best) counts within the prompt of `group_ids_N`. Responses of a prompt may stand anywhere,
    but must all be there. Ties give no pair; a prompt with nothing but ties adds 0.

    With d the difference of the log-ratios, better minus worse, a pair's loss is
    - sigmoid: -(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d), s = `label_smoothing`
      (eq. 7; s: conservative DPO, https://ericmitchell.ai/cdpo.pdf);
    - robust: (-(1 - s) log sigmoid(beta d) + s log sigmoid(-beta d)) / (1 - 2 s)
      (arXiv:2403.00409), whose mean over flipped labels is the loss of the true ones;
    - ipo: (d - 1 / (2 beta))^2 (arXiv:2310.12036, eq. 17), d summed over tokens.
    plackett_luce is -log p(ranking) (appendix A.3): each response against those below it.

    Metrics are sums, too: over pairs `dpo/num_pairs`, `dpo/num_correct` (implicit rewards as people
    ordered them; equal ones count half), `dpo/chosen_reward` and `dpo/rejected_reward`; over
    responses `dpo/num_responses` and `dpo/log_ratio`.
    """
    better = beats(ranks_N, group_ids_N)
    winner, loser = better.nonzero(as_tuple=True)  # (num_pairs,) each
    difference = log_ratios_N[winner] - log_ratios_N[loser]
    if loss == "plackett_luce":
        total = _ranking(beta * log_ratios_N, better).sum()
    else:
        groups, group_of = torch.unique(group_ids_N, return_inverse=True)
        num_pairs = torch.bincount(group_of[winner], minlength=groups.shape[0])  # (num_groups,)
        pairs = _pair_losses(difference, beta, loss, label_smoothing)
        total = (pairs / num_pairs[group_of[winner]]).sum()
    with torch.no_grad():
        correct = (difference > 0).float() + 0.5 * (difference == 0).float()
        metrics = {
            "dpo/loss": total.detach(),
            "dpo/num_pairs": better.sum().float(),
            "dpo/num_correct": correct.sum(),
            "dpo/chosen_reward": beta * log_ratios_N[winner].sum(),
            "dpo/rejected_reward": beta * log_ratios_N[loser].sum(),
            "dpo/num_responses": torch.ones_like(log_ratios_N).sum(),
            "dpo/log_ratio": log_ratios_N.sum(),
        }
    return total, metrics


def beats(ranks_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """Return a bool (N, N): whether the row's response is ranked above the column's."""
    same_group = group_ids_N.unsqueeze(1) == group_ids_N.unsqueeze(0)
    return same_group & (ranks_N.unsqueeze(1) < ranks_N.unsqueeze(0))


def _pair_losses(
    difference: Tensor, beta: float, loss: PreferenceLoss, label_smoothing: float
) -> Tensor:
    if loss == "ipo":
        return (difference - 1 / (2 * beta)).square()
    right, wrong = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
    if loss == "sigmoid":
        return (1 - label_smoothing) * right + label_smoothing * wrong
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def _ranking(rewards_N: Tensor, better: Tensor) -> Tensor:
    """Return -log of the chance (N,) that each response is chosen among itself and those below."""
    rivals = better | torch.eye(len(better), dtype=torch.bool, device=better.device)
    rewards = rewards_N.unsqueeze(0).expand_as(better).masked_fill(~rivals, -torch.inf)
    return torch.logsumexp(rewards, dim=1) - rewards_N
