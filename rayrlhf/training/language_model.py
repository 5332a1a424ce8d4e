"""What pretraining and SFT share: next-token loss on the tokens of a mask, in nats per token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.losses import negative_log_likelihood
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.training.backend import Backend
from rayrlhf.training.stage import MicroBatch, Stage, evaluating, global_totals

SAMPLE_TOKENS = 24
"""Longest continuation that is shown while training."""


@dataclass(frozen=True)
class TextBatch(MicroBatch):
    """Sequences, and which of their tokens are to be predicted."""

    loss_mask: Tensor
    """(b, S) bool"""


class LanguageModelStage(Stage):
    """A stage that trains a CausalLMModel on TextBatches; `count` is the tokens with loss."""

    def loss(self, backend: Backend, micro: TextBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs = backend(
            micro.input_ids, micro.attention_mask, positions=micro.loss_mask
        )  # (b, S)
        return negative_log_likelihood(log_probs, micro.loss_mask)

    def metrics(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        return {"loss": sums["loss"] / max(count, 1.0)}

    def empty(self) -> TextBatch:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        return TextBatch(ids, torch.ones_like(ids), 0.0, 0, torch.zeros_like(ids, dtype=torch.bool))

    def save(self, module: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        assert isinstance(module, CausalLMModel)
        module.save_pretrained(folder, weights)

    def mean_loss(self, backend: Backend, micros: Sequence[TextBatch]) -> tuple[float, float]:
        """Return (sum of the loss in nats, tokens) over the micro-batches of all ranks."""
        with evaluating(backend):
            sums, count = global_totals(self, backend, micros)
        return sums["loss"], count


def continuations(  # noqa: PLR0913 (each is a plain choice)
    backend: Backend,
    tokenizer: Any,
    prompt: str,
    prompt_ids: list[int],
    *,
    seed: int,
    max_tokens: int = SAMPLE_TOKENS,
) -> list[dict[str, str]]:
    """Return a greedy and a sampled continuation of one prompt, as lines of samples.jsonl.

    Every rank computes the same ones: under ZeRO-3 and FSDP a forward is collective.
    """
    module = backend.module
    assert isinstance(module, CausalLMModel)
    ids = torch.tensor([prompt_ids], device=backend.device)  # (1, S)
    records = []
    with evaluating(backend), torch.random.fork_rng():
        for kind in ("greedy", "sampled"):
            torch.manual_seed(seed)
            out = module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=kind == "sampled",
                top_k=0 if kind == "sampled" else None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            text = tokenizer.decode(out[0, len(prompt_ids) :], skip_special_tokens=True)
            records.append({"prompt": prompt, "text": text, "kind": kind})
    return records
