"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings while a model trains.

The noise of a token is uniform in [-1, 1] times alpha / sqrt(L d), with L the tokens of its own
sequence: in a packed row, of its document, so that packing does not change the noise. The paper's
code takes the padded length of the batch for L, and so less noise for short sequences.
"""

from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """A forward hook of an embedding; `lengths` are set before every forward."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: Tensor | None = None
        """(b, S'), of the tokens on this rank: `document_lengths`."""

    def __call__(self, module: nn.Module, _: Any, output: Tensor) -> Tensor:
        """Add noise to `output` (b, S', d) in train mode."""
        if not module.training or self.lengths is None:
            return output
        # What fills a row up has no length.
        scale = self.alpha * (self.lengths.clamp(min=1) * output.shape[-1]).rsqrt()  # (b, S')
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * scale.unsqueeze(-1).to(output.dtype)


def document_lengths(mask: Tensor) -> Tensor:
    """Return (b, S) float32: of each token the length of its document; of padding, its count.

    The mask (b, S) is 0 on padding and numbers the documents of a row 1, 2, ...
    """
    counts = mask.new_zeros(mask.shape[0], int(mask.max()) + 1)
    counts.scatter_add_(1, mask, torch.ones_like(mask))
    return counts.gather(1, mask).float()
