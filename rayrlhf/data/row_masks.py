"""Packed rows as a model sees them: which tokens attend to each other, and which have a loss."""

import torch
from torch import Tensor


def row_masks(rows: Tensor, eos_id: int, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Return the attention mask (n, T) int64 and the loss mask (n, T) bool of rows (n, T).

    The attention mask is 0 on filling and 1 on all else; with `apart` it numbers the documents
    1, 2, ..., which then do not see each other. A row's first token has no loss, nor has filling,
    nor, with `apart`, a document's first token: nothing before them tells what they are.
    """
    loss_mask = torch.ones_like(rows, dtype=torch.bool)
    loss_mask[:, 0] = False
    ended = rows == eos_id  # (n, T)
    begins = torch.zeros_like(ended)
    begins[:, 1:] = ended[:, :-1]
    # No document is empty: end-of-text after end-of-text fills up a row.
    filling = ended & begins
    loss_mask &= ~filling
    attention_mask = torch.ones_like(rows)
    if apart:
        loss_mask &= ~begins
        attention_mask += begins.cumsum(dim=1)
    return attention_mask.masked_fill(filling, 0), loss_mask
