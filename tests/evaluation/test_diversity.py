"""Distinct-n by hand; log-probs, entropy and KL against the plain formula."""

from pathlib import Path

import pytest
import torch

from rayrlhf.evaluation.diversity import (
    TokenStatistics,
    distinct_n,
    kl_per_response,
    token_statistics,
)
from rayrlhf.models.causal_lm import CausalLMModel


def test_distinct_2_by_hand() -> None:
    # "the cat", "cat sat", "the cat", "cat ran": three of four are distinct.
    assert distinct_n(["The cat sat.", "the CAT ran"], 2) == 0.75
    assert distinct_n(["a b", "b a"], 2) == 1.0  # no bigram across two texts
    assert distinct_n(["so so so so"], 2) == pytest.approx(1 / 3)
    assert distinct_n(["don't stop"], 2) == 1.0
    assert distinct_n(["", "one"], 2) == 0.0


def test_statistics_equal_the_plain_formula(tiny_model: Path) -> None:
    model = CausalLMModel.from_pretrained(tiny_model).eval()
    prompts = [[5, 6, 7], [8], [9, 10]]
    responses = [[11, 12, 0], [13, 14, 15, 16, 17, 0], [18]]
    found = token_statistics(model, prompts, responses, temperature=0.7, tokens_per_batch=12)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = model.hf(torch.tensor([prompt + response])).logits[0] / 0.7  # (S, V)
        rows = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]  # (T, V)
        chosen = rows[torch.arange(len(response)), torch.tensor(response)]
        assert found.log_probs[i] == pytest.approx(chosen.sum().item(), abs=1e-4)
        entropy = -(rows.exp() * rows).sum().item()
        assert found.entropies[i] == pytest.approx(entropy, abs=1e-4)
    assert found.lengths == [3, 6, 1]
    assert found.entropy_per_token == pytest.approx(sum(found.entropies) / 10)


def test_kl_is_a_mean_over_responses_and_0_for_the_reference() -> None:
    own = TokenStatistics([-2.0, -5.0], [1.0, 1.0], [1, 2])
    other = TokenStatistics([-4.0, -6.0], [1.0, 1.0], [1, 2])
    assert kl_per_response(own, other) == 1.5
    assert kl_per_response(own, own) == 0.0
