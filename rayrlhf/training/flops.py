"""Model FLOPs of a training step.

Counted as in PaLM (arXiv:2204.02311, appendix B), but for the attention that a causal mask and the
ends of documents leave, and for the output layer only where it is asked for a number. Work that
the result does not need counts for nothing: padding, masked scores, what gradient checkpointing
computes again. For dense models whose layers all attend to the whole document.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rayrlhf.models.execution import huggingface_model
from rayrlhf.models.folder import document_positions


@dataclass(frozen=True)
class ModelFlops:
    """What passes of a model take; a product and its addition are 2."""

    per_token: int
    """Of the matrices of all layers: 6 for each entry, 4 where it is frozen, 2 forward only."""
    per_pair: int
    """Of a token and one that it attends to, itself included, in all layers."""
    per_output: int
    """Of the output layer, for a token that it is asked for."""

    def total(self, *, num_tokens: int, num_pairs: int, num_outputs: int) -> int:
        """Return the FLOPs of so many tokens, pairs and outputs."""
        return (
            self.per_token * num_tokens + self.per_pair * num_pairs + self.per_output * num_outputs
        )


def model_flops(module: nn.Module, *, forward_only: bool = False) -> ModelFlops:
    """Measure the HF model in `module`, whose weights are whole: before a backend shards them.

    Of a forward and a backward pass, or of a forward pass alone.
    """

    def per_entry(weight: Tensor) -> int:
        """Return the FLOPs of an entry: forward, for the input's gradient, and for its own."""
        return 2 if forward_only else 6 if weight.requires_grad else 4

    hf = huggingface_model(module)
    assert hf is not None
    per_token = 0
    for layer in hf.base_model.modules():
        # The sizes are not read off the weight, which quantization packs.
        if isinstance(layer, nn.Linear):
            per_token += per_entry(layer.weight) * layer.in_features * layer.out_features
        elif isinstance(layer, Conv1D):
            per_token += per_entry(layer.weight) * layer.nx * layer.nf
    within = {id(parameter) for parameter in hf.base_model.parameters()}
    outside = [p for p in hf.parameters() if p.ndim == 2 and id(p) not in within]
    head = outside or [hf.get_input_embeddings().weight]  # tied
    return ModelFlops(
        per_token,
        (4 if forward_only else 12) * hf.config.num_hidden_layers * _attention_width(hf.config),
        sum(per_entry(weight) * weight.numel() for weight in head),
    )


def attended_pairs(attention_mask: Tensor) -> int:
    """Return the pairs (token, token that it attends to) of a mask (b, S), itself included.

    The mask is 0 on padding and numbers the documents of a row, as in `models.folder.run_trunk`.
    """
    return int(((document_positions(attention_mask) + 1) * (attention_mask > 0)).sum())


def _attention_width(config: PreTrainedConfig) -> int:
    heads: int = config.num_attention_heads
    head_size: int | None = config.to_dict().get("head_dim")
    return heads * head_size if head_size else int(config.hidden_size)
