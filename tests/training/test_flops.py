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
from rayrlhf.training.flops import ModelFlops, attended_pairs, model_flops

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
    wanted = ModelFlops(6 * 2 * layer, 12 * 2 * 32, 6 * 50 * 16)
    assert model_flops(LlamaForCausalLM(LLAMA)) == wanted
    assert model_flops(CausalLMModel(LlamaForCausalLM(tied))) == wanted
    scored = LlamaForSequenceClassification(LlamaConfig(**{**LLAMA.to_dict(), "num_labels": 1}))
    assert model_flops(ScalarHeadModel(scored)) == ModelFlops(12 * layer, 24 * 32, 6 * 16)
    assert model_flops(GPT2LMHeadModel(GPT2)) == ModelFlops(6 * 24 * 256, 24 * 16, 6 * 800)


def test_frozen_matrices_have_no_gradient_of_their_own() -> None:
    model = LlamaForCausalLM(LLAMA)
    whole = model_flops(model)
    model.requires_grad_(False)
    frozen = ModelFlops(whole.per_token * 4 // 6, whole.per_pair, whole.per_output * 4 // 6)
    assert model_flops(model) == frozen


def test_total_by_hand() -> None:
    flops = ModelFlops(per_token=100, per_pair=7, per_output=10)
    assert flops.total(num_tokens=5, num_pairs=15, num_outputs=2) == 500 + 105 + 20


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
    counted = model_flops(model).total(num_tokens=b * s, num_pairs=b * s * s, num_outputs=b * s)
    assert counter.get_total_flops() == counted
