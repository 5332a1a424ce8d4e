"""How varied a model's own responses are, and how far they are from the reference's.

Entropy and KL are of the distribution that the responses were sampled from: at the temperature of
the sampling, over the whole vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayrlhf.data.datasets import pad
from rayrlhf.data.packing import microbatches
from rayrlhf.models.causal_lm import CausalLMModel

_WORD = re.compile(r"\w+(?:'\w+)*")


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of distinct n-grams of words (lower case) among all n-grams of the texts.

    0 to 1. It falls as there are more texts, so compare equal numbers of them only. No n-gram
    crosses two texts; 0 when no text has n words. Source: arXiv:1510.03055.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        grams = ngrams(words_of(text), n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, punctuation left out."""
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return every run of n words, in order."""
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


@dataclass(frozen=True)
class TokenStatistics:
    """Sums over the response tokens of each of N responses."""

    log_probs: list[float]
    """Nats per response: the log of the chance that the model gives to the whole response."""
    entropies: list[float]
    """Nats per response: entropies of the next-token distributions, summed."""
    lengths: list[int]
    """Response tokens."""

    @property
    def entropy_per_token(self) -> float:
        """Nats per token, every token of every response counting the same."""
        return sum(self.entropies) / max(1, sum(self.lengths))


@torch.inference_mode()
def token_statistics(
    model: CausalLMModel,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    temperature: float,
    tokens_per_batch: int,
) -> TokenStatistics:
    """Run the model over prompt and response, and sum log-probs and entropies of the latter."""
    sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
    lengths = [len(ids) for ids in sequences]
    log_probs = [0.0] * len(sequences)
    entropies = [0.0] * len(sequences)
    device = next(model.parameters()).device
    for indices in microbatches(lengths, tokens_per_batch):
        input_ids, attention_mask = pad([sequences[i] for i in indices], 0)
        generated = torch.zeros_like(attention_mask, dtype=torch.bool)  # (b, S)
        for row, i in enumerate(indices):
            generated[row, len(prompts[i]) : lengths[i]] = True
        found, entropy = model(
            input_ids.to(device),
            attention_mask.to(device),
            positions=generated.to(device),
            temperature=temperature,
            with_entropy=True,
        )  # (b, S) both
        for i, log_prob, nats in zip(
            indices,
            found.double().sum(dim=1).tolist(),
            entropy.double().sum(dim=1).tolist(),
            strict=True,
        ):
            log_probs[i], entropies[i] = log_prob, nats
    return TokenStatistics(log_probs, entropies, [len(ids) for ids in responses])


def kl_per_response(own: TokenStatistics, reference: TokenStatistics) -> float:
    """Return the mean over responses of log pi(response) - log pi_ref(response), in nats.

    An estimate of KL(pi || pi_ref) when the responses were sampled from pi.
    Source: arXiv:1909.08593, eq. 2.
    """
    gaps = [a - b for a, b in zip(own.log_probs, reference.log_probs, strict=True)]
    return sum(gaps) / max(1, len(gaps))
