"""Sequence parallelism: n ranks share each row (DeepSpeed Ulysses, arXiv:2309.14509).

Rank j of a group computes tokens [j S/n, (j + 1) S/n) of every row in all layers. Attention alone
needs the whole row: an all-to-all gives each rank all tokens of 1/n of the heads, another one gives
the tokens back. What the model says of each token, one number, is gathered on all ranks of the
group, which then compute the same loss; a rank's gradient is that of its own tokens.

DeepSpeed's `DistributedAttention` does the exchange. Its `UlyssesSPAttentionHF` is not used: it
replaces transformers' own attention for good, wants micro-batches of one size, and drops the mask
that keeps the documents of a packed row apart.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayrlhf.config import RecipeError
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.models.sequence import WholeSequence
from rayrlhf.training.backend.deepspeed import meet_deepspeed_needs

NAME = "ulysses"
"""Of the attention among those of transformers."""


def split_sequences(module: nn.Module, size: int, device: torch.device) -> None:
    """Let groups of `size` neighbouring ranks share the rows of `module`; every rank calls it.

    Raises RecipeError for a model whose attention cannot be exchanged.
    """
    assert isinstance(module, (CausalLMModel, ScalarHeadModel))
    group = _own_group(size)
    meet_deepspeed_needs(device)
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)
    sequence = SplitSequence(group)
    AttentionInterface.register(NAME, sequence.attention)
    # For rows that are not split: a sample that is generated while training.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module.hf.set_attn_implementation(NAME)
    if module.config._attn_implementation != NAME:
        raise RecipeError(
            f"resources.sequence_parallel={size}: the attention of {type(module.hf).__name__} "
            "cannot be exchanged for another: set it to 1"
        )
    module.sequence = sequence


class SplitSequence(WholeSequence):
    """Rows spread over the ranks of `group`, each of which has a part of S' = ceil(S/n) tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._exchanging = DistributedAttention(_attend, group, scatter_idx=2, gather_idx=1)

    def own(self, rows: Tensor) -> Tensor:
        return self._filled(rows).chunk(self._size, dim=1)[self._rank].contiguous()

    def join(self, parts: Tensor, length: int) -> Tensor:
        joined: Tensor = _Join.apply(parts, self._group)
        return joined[:, :length]

    def trunk(
        self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        if position_ids is None:
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = columns.expand_as(input_ids)
        # Positions count from 0 in each document. What fills a row up is 0, too: apart from all.
        starts = (self._filled(position_ids) == 0).flatten().nonzero().squeeze(1)
        end = starts.new_tensor([input_ids.shape[0] * self._filled(input_ids[:1]).shape[1]])
        lengths = starts.diff(append=end).cpu()
        # A mask of four dimensions goes through transformers untouched, to `attention`.
        output = model.base_model(
            input_ids=self.own(input_ids),
            position_ids=self.own(position_ids),
            attention_mask=lengths[None, None, None],
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' attention functions do: (b, heads, S', d) -> (b, S', heads, d).

        An int64 `attention_mask` is the lengths of the documents in the flattened rows, whole.
        """
        if attention_mask is None or attention_mask.dtype != torch.int64:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        copies = max(1, self._size // key.shape[1])  # of key-value heads, to give each rank one
        context: Tensor = self._exchanging(
            query.transpose(1, 2),
            key.repeat_interleave(copies, dim=1).transpose(1, 2),
            value.repeat_interleave(copies, dim=1).transpose(1, 2),
            0,  # the dimension of the batch
            lengths=attention_mask.flatten().tolist(),
            scale=options.get("scaling"),
            dropout=options.get("dropout", 0.0),
        )
        return context, None

    def _filled(self, rows: Tensor) -> Tensor:
        """Return rows (b, S), filled up with zeros on the right to a multiple of the ranks."""
        return F.pad(rows, (0, -rows.shape[1] % self._size))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: list[int],
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Return causal attention (b, S, heads, d) within each document; no (S, S) mask is made."""

    def documents(x: Tensor) -> tuple[Tensor, ...]:
        return x.flatten(0, 1).transpose(0, 1)[None].split(lengths, dim=2)  # (1, heads, length, d)

    parts = [
        F.scaled_dot_product_attention(
            *document,
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        for document in zip(documents(query), documents(key), documents(value), strict=True)
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1).unflatten(0, query.shape[:2])


class _Join(torch.autograd.Function):
    """(b, S') on each rank -> (b, n S') on all of them.

    All ranks of the group compute the same loss of it, so the gradient of a rank's part is the one
    that it has itself: summed over the ranks it would count n times.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(part) for _ in range(ctx.size)]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.size, dim=1)[ctx.rank], None


def _own_group(size: int) -> dist.ProcessGroup:
    """Return this rank's group; every rank makes all groups, in the same order."""
    groups = [
        dist.new_group(list(range(first, first + size)))
        for first in range(0, dist.get_world_size(), size)
    ]
    group = groups[dist.get_rank() // size]
    assert isinstance(group, dist.ProcessGroup)
    return group
