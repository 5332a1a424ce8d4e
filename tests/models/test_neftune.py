"""NEFTune: the scale of the noise by hand, and where there is none."""

from pathlib import Path

import pytest
import torch

from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.neftune import EmbeddingNoise, document_lengths

# A row with documents of 4 and 1 tokens and padding, and one with a document of 6.
MASK = torch.tensor([[1, 1, 1, 1, 2, 0], [1, 1, 1, 1, 1, 1]])


def test_the_length_is_that_of_the_document() -> None:
    assert document_lengths(MASK)[0, :5].tolist() == [4, 4, 4, 4, 1]
    assert document_lengths(MASK)[1].tolist() == [6] * 6


def test_the_noise_is_uniform_within_alpha_over_the_root_of_length_times_width() -> None:
    width = 10_000
    noise = EmbeddingNoise(alpha=5.0)
    noise.lengths = document_lengths(MASK)
    module = torch.nn.Embedding(3, 4).train()
    torch.manual_seed(0)
    added = noise(module, (), torch.zeros(2, 6, width))
    # 5 / sqrt(4 * 10000) = 0.025, 5 / sqrt(1 * 10000) = 0.05, 5 / sqrt(6 * 10000) = 0.0204
    for row, columns, bound in ((0, slice(0, 4), 0.025), (0, slice(4, 5), 0.05), (1, ..., 0.0204)):
        values = added[row, columns].flatten()
        assert values.abs().max() <= bound * 1.001
        assert values.max() > bound * 0.999 and values.min() < -bound * 0.999 + 1e-4
        assert float(values.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert abs(float(values.mean())) < bound * 0.03


def test_noise_in_train_mode_alone(tiny_model: Path) -> None:
    model = CausalLMModel.from_pretrained(tiny_model)
    ids = torch.arange(12).view(2, 6) + 40
    with torch.no_grad():
        clean = model(ids, MASK)
        model.add_noise(5.0)
        assert torch.equal(model(ids, MASK), clean)
        model.train()
        torch.manual_seed(1)
        noisy = model(ids, MASK)
        assert (noisy - clean).abs().max() > 1e-3
        assert not torch.equal(model(ids, MASK), noisy)  # anew in every step
        torch.manual_seed(1)
        assert torch.equal(model(ids, MASK), noisy)
        model.eval()
        assert torch.equal(model(ids, MASK), clean)
