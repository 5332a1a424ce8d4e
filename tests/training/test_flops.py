"""FLOPs of a step: by hand, and as torch counts what eager attention does."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.training.flops import ModelSize, attended_pairs, model_size, training_flops

LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attn_implementation="eager",
)
GPT2 = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, attn_implementation="eager"
)


def test_size_by_hand() -> None:
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    # q: 4 heads, k and v: 2 heads, o; three matrices of the MLP.
    layer = 16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 24
    wanted = ModelSize(2 * layer, 50 * 16, 2 * 32)
    assert model_size(LlamaForCausalLM(LLAMA)) == wanted
    assert model_size(CausalLMModel(LlamaForCausalLM(tied))) == wanted
    scored = LlamaForSequenceClassification(LlamaConfig(**{**LLAMA.to_dict(), "num_labels": 1}))
    assert model_size(ScalarHeadModel(scored)) == ModelSize(2 * layer, 16, 2 * 32)
    assert model_size(GPT2LMHeadModel(GPT2)) == ModelSize(2 * 12 * 16 * 16, 50 * 16, 2 * 16)


def test_flops_by_hand() -> None:
    size = ModelSize(matmul_parameters=100, head_parameters=10, attention_size=7)
    assert training_flops(size, num_tokens=5, num_pairs=15, num_outputs=2) == 3000 + 1260 + 120


def test_pairs_by_hand() -> None:
    # 5 tokens: 15 pairs; documents of 2 and 2, and padding: 3 + 3; padding on the left of 3: 6.
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0], [0, 0, 1, 1, 1]])
    assert [attended_pairs(row[None]) for row in mask] == [15, 6, 6]
    assert attended_pairs(mask) == 27


@pytest.mark.parametrize("model", [LlamaForCausalLM(LLAMA), GPT2LMHeadModel(GPT2)])
def test_flops_are_those_that_torch_counts(model: PreTrainedModel) -> None:
    b, s = 2, 12
    ids = torch.randint(0, 50, (b, s))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    # Eager attention computes all s * s pairs of a row, masked or not.
    counted = training_flops(
        model_size(model), num_tokens=b * s, num_pairs=b * s * s, num_outputs=b * s
    )
    assert counter.get_total_flops() == counted
