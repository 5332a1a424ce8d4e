"""Model FLOPs of a training step.

Counted as in PaLM (arXiv:2204.02311, appendix B), but for the attention that a causal mask and the
ends of documents leave, and for the output layer only where it is asked for a number. Work that
the result does not need counts for nothing: padding, masked scores, what gradient checkpointing
computes again. For dense models whose layers all attend to the whole document.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rayrlhf.models.execution import huggingface_model


@dataclass(frozen=True)
class ModelSize:
    """What the FLOPs of a model follow from."""

    matmul_parameters: int
    """Entries of the matrices of the trunk: each takes part in one product per token."""
    head_parameters: int
    """Entries of the output layer: those, for every token that it is asked for."""
    attention_size: int
    """Heads times head size, summed over the layers: products of one query with one key."""


def model_size(module: nn.Module) -> ModelSize:
    """Measure the HF model in `module`, whose weights are whole: before a backend shards them."""
    hf = huggingface_model(module)
    assert hf is not None
    trunk = [m for m in hf.base_model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    within = {id(parameter) for parameter in hf.base_model.parameters()}
    outside = [p for p in hf.parameters() if p.ndim == 2 and id(p) not in within]
    tied = hf.get_input_embeddings().weight
    return ModelSize(
        matmul_parameters=sum(m.weight.numel() for m in trunk),
        head_parameters=sum(p.numel() for p in outside) or tied.numel(),
        attention_size=hf.config.num_hidden_layers * _attention_width(hf.config),
    )


def training_flops(
    size: ModelSize, *, num_tokens: float, num_pairs: float, num_outputs: float
) -> float:
    """Return the FLOPs of a forward and backward pass.

    A product of two numbers and its addition are 2; backward takes twice what forward takes.
    `num_pairs` are those of a token and a token that it attends to, itself included;
    `num_outputs` are the tokens that the output layer is asked for.
    """
    return (
        6.0 * size.matmul_parameters * num_tokens
        + 12.0 * size.attention_size * num_pairs
        + 6.0 * size.head_parameters * num_outputs
    )


def attended_pairs(attention_mask: Tensor) -> int:
    """Return the pairs (token, token that it attends to) of a mask (b, S), itself included.

    The mask is 0 on padding and numbers the documents of a row, as in `models.folder.run_trunk`.
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    changes = F.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)
    begins = torch.where(changes, columns, 0).cummax(dim=1).values  # (b, S) of the own document
    return int(((columns - begins + 1) * (attention_mask > 0)).sum())


def _attention_width(config: PreTrainedConfig) -> int:
    heads: int = config.num_attention_heads
    head_size: int | None = config.to_dict().get("head_dim")
    return heads * head_size if head_size else int(config.hidden_size)
