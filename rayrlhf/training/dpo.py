"""DPO: the policy itself, trained on ranked completions, with the SFT model as its reference.

arXiv:2305.18290. Of K ranked responses every ordered pair counts, yet each response runs once. The
reference's log-probs are computed before the first step and read from then on (reference.py), so
one model is in memory. The paper's RMSprop is left out: AdamW, as everywhere here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayrlhf import lineage
from rayrlhf.algorithms.dpo import beats, dpo_loss
from rayrlhf.config import DPOConfig, Recipe, RecipeError
from rayrlhf.data import encoded
from rayrlhf.data.datasets import batch_indices, lay_out, number_documents, pad, shard
from rayrlhf.data.packing import pack_tight, within_budget
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.training.backend import Backend
from rayrlhf.training.language_model import SAMPLE_TOKENS, continuations
from rayrlhf.training.loop import train_stage
from rayrlhf.training.reference import SAVE_EVERY_S, ReferenceLogProbs
from rayrlhf.training.stage import MicroBatch, Stage, evaluating, padded

PROMPTS_LOOKED_AT = 256


def train_dpo(recipe: Recipe) -> Path:
    """Train the policy on comparisons; return its folder.

    Raises RecipeError when a record is wrong or the start model does not fit.
    """
    return train_stage(recipe, DPOStage)


@dataclass(frozen=True)
class PreferenceBatch(MicroBatch):
    """All N responses of some comparisons, packed; `count` is comparisons."""

    response_mask: Tensor
    """(b, S) bool, the tokens of responses"""
    tokens: Tensor
    """(N, T) int64, where each response's tokens lie in the flattened (b * S); 0, which is a
    prompt's, after its last"""
    numbers: Tensor
    """(N,) int64, positions of the responses among all of the data set"""
    ref_log_probs: Tensor
    """(N,) log pi_ref of each response, nats"""
    ranks: Tensor
    """(N,) int64, 1 = best of its comparison"""
    groups: Tensor
    """(N,) int64, which comparison a response belongs to"""

    @property
    def num_outputs(self) -> int:
        return int(self.response_mask.sum())


class Preferences:
    """Comparisons, and the reference's log-prob of every response of theirs."""

    def __init__(self, recipe: Recipe, path: str, reference: Path) -> None:
        self.comparisons = encoded.comparisons(recipe, path, recipe.model.max_length)
        ends = np.cumsum(self.comparisons.num_sequences)
        self.starts = ends - self.comparisons.num_sequences
        """Number of each comparison's first response."""
        self.reference = ReferenceLogProbs(reference, int(ends[-1]))

    def __len__(self) -> int:
        return len(self.comparisons)

    def costs(self, indices: Sequence[int]) -> list[float]:
        """Return the tokens of each of these comparisons."""
        return [float(self.comparisons.lengths[index]) for index in indices]

    def responses(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers of these comparisons' responses, each once."""
        starts, counts = self.starts, self.comparisons.num_sequences
        return [
            int(starts[index]) + k for index in dict.fromkeys(indices) for k in range(counts[index])
        ]


class DPOStage(Stage):
    """Comparisons; each stays whole within one micro-batch."""

    name = "dpo"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.start = self.start_folder()
        folder = self.folder / "reference"
        self.train = Preferences(recipe, self.cfg.train, folder / "train.safetensors")
        self.validation: Preferences | None = None
        if self.cfg.validation is not None:
            held_out = folder / "validation.safetensors"
            self.validation = Preferences(recipe, self.cfg.validation, held_out)

    @property
    def cfg(self) -> DPOConfig:
        assert self.recipe.dpo is not None
        return self.recipe.dpo

    @property
    def num_records(self) -> int:
        return len(self.train)

    def build(self, checkpoint: Path | None) -> CausalLMModel:
        return CausalLMModel.to_finetune(
            self.start, self.cfg, checkpoint=checkpoint, seed=self.recipe.seed
        )

    def costs(self, indices: Sequence[int]) -> list[float]:
        return self.train.costs(indices)

    def microbatches(self, indices: Sequence[int]) -> list[PreferenceBatch]:
        return self._cut(self.train, indices)

    def _cut(self, data: Preferences, indices: Sequence[int]) -> list[PreferenceBatch]:
        groups = within_budget(
            [int(cost) for cost in data.costs(indices)], self.cfg.tokens_per_microbatch
        )
        return [self._batch(data, [indices[place] for place in group]) for group in groups]

    def _batch(self, data: Preferences, indices: Sequence[int]) -> PreferenceBatch:
        comparisons = [data.comparisons[index] for index in indices]
        responses = [
            (ids, comparison.prompt_length, int(data.starts[index]) + k, comparison.ranks[k], group)
            for group, (index, comparison) in enumerate(zip(indices, comparisons, strict=True))
            for k, ids in enumerate(comparison.ids)
        ]
        lengths = [len(ids) for ids, *_ in responses]
        rows = pack_tight(lengths, self.cfg.tokens_per_microbatch)
        texts = [[responses[place][0] for place in row] for row in rows]
        input_ids = lay_out(texts, self.tokenizer.pad_token_id)  # (b, S)
        tokens = []
        for number, row in enumerate(rows):
            start = number * input_ids.shape[1]
            for ids, prompt_length, *_ in (responses[place] for place in row):
                tokens.append(range(start + prompt_length, start + len(ids)))
                start += len(ids)
        response_mask = torch.zeros(input_ids.numel(), dtype=torch.bool)
        response_mask[[place for span in tokens for place in span]] = True
        ordered = [responses[place] for row in rows for place in row]
        numbers = torch.tensor([number for _, _, number, _, _ in ordered])
        return PreferenceBatch(
            input_ids,
            number_documents(texts),
            float(len(comparisons)),
            sum(lengths),
            response_mask.view_as(input_ids),
            pad(tokens, 0)[0],
            numbers,
            data.reference.values[numbers],
            torch.tensor([rank for *_, rank, _ in ordered]),
            torch.tensor([group for *_, group in ordered]),
        )

    def empty(self) -> PreferenceBatch:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        return PreferenceBatch(
            ids,
            torch.ones_like(ids),
            0.0,
            0,
            torch.zeros_like(ids, dtype=torch.bool),
            none.view(0, 1),
            none,
            none.float(),
            none,
            none,
        )

    def response_log_probs(self, backend: Backend, micro: PreferenceBatch) -> Tensor:
        """Return log pi(response | prompt) of the N responses, nats."""
        log_probs = backend(
            micro.input_ids, micro.attention_mask, positions=micro.response_mask
        )  # (b, S), 0 where not asked for
        by_response: Tensor = log_probs.flatten()[micro.tokens]  # (N, T)
        return by_response.sum(dim=1)

    def loss(self, backend: Backend, micro: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs = self.response_log_probs(backend, micro)  # (N,)
        loss, sums = dpo_loss(
            log_probs - micro.ref_log_probs,
            micro.ranks,
            micro.groups,
            beta=self.cfg.beta,
            loss=self.cfg.loss,
            label_smoothing=self.cfg.label_smoothing,
        )
        winner, loser = beats(micro.ranks, micro.groups).nonzero(as_tuple=True)
        found = log_probs.detach()
        sums["dpo/chosen_log_prob"] = found[winner].sum()
        sums["dpo/rejected_log_prob"] = found[loser].sum()
        return loss, sums

    def metrics(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        pairs = max(sums["dpo/num_pairs"], 1.0)
        per_pair = ("chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob")
        return {
            "loss": sums["dpo/loss"] / max(count, 1.0),
            "pair_accuracy": sums["dpo/num_correct"] / pairs,
            "num_pairs": sums["dpo/num_pairs"],
            "reward_margin": (sums["dpo/chosen_reward"] - sums["dpo/rejected_reward"]) / pairs,
            **{name: sums[f"dpo/{name}"] / pairs for name in per_pair},
            "log_ratio": sums["dpo/log_ratio"] / max(sums["dpo/num_responses"], 1.0),
        }

    def prepare(self, backend: Backend, *, resumed: bool) -> None:
        """Have the reference's log-prob of every response that training and evaluation use.

        The micro-batches are those of the first epoch's steps, so that at the first one log pi and
        log pi_ref are the same number. Raises RecipeError when a resumed run lacks some.
        """
        model = self._model_hash() if backend.rank == 0 else ""
        for data in filter(None, (self.train, self.validation)):
            key = json.dumps(
                [model, data.comparisons.key, self.cfg.precision, self.cfg.quantization]
            )
            origin = hashlib.sha256(key.encode()).hexdigest()
            data.reference.read(backend, origin)
            todo = [
                indices
                for indices in self._batches(data)
                if not data.reference.has(data.responses(indices))
            ]
            if todo and resumed:
                raise RecipeError(
                    f"{data.reference.path} lacks log-probs of the start model, or is of another "
                    "model or other data, and the checkpoint's weights are no longer the start "
                    f"model's: put the file back, or remove {self.folder} to start afresh"
                )
            for indices in todo:
                found = self._log_probs_by_number(backend, self._share(data, indices, backend))
                data.reference.add(backend, data.responses(indices), found)
                if backend.rank == 0:
                    data.reference.save(origin, after_s=SAVE_EVERY_S)
            if todo and backend.rank == 0:
                data.reference.save(origin)

    def _model_hash(self) -> str:
        """Return the hash of the start model's folder; of one at a hub, its name."""
        folder = Path(self.start)
        return lineage.hash_path(folder) if folder.is_dir() else self.start

    def _batches(self, data: Preferences) -> Iterator[list[int]]:
        """Yield the comparisons of the first epoch's steps; all of the validation set at once."""
        if data is not self.train:
            yield list(range(len(data)))
            return
        size = self.cfg.batch_size
        for step in range(min(self.total_steps, -(-len(data) // size))):
            yield batch_indices(
                seed=self.recipe.seed, step=step, batch_size=size, num_records=len(data)
            )

    def _share(
        self, data: Preferences, indices: Sequence[int], backend: Backend
    ) -> list[PreferenceBatch]:
        """Return this rank's part of a batch as micro-batches, as the loop cuts it."""
        costs = data.costs(indices)
        return self._cut(data, shard(indices, backend.data_rank, backend.data_size, costs))

    def _log_probs_by_number(
        self, backend: Backend, micros: Sequence[PreferenceBatch]
    ) -> dict[int, list[float]]:
        """Return log pi of each response by its number; every rank calls it."""
        found: dict[int, list[float]] = {}
        with evaluating(backend):
            for micro in padded(self, backend, micros):
                assert isinstance(micro, PreferenceBatch)
                values = self.response_log_probs(backend, micro.to(backend.device))
                for number, value in zip(micro.numbers.tolist(), values.tolist(), strict=True):
                    found.setdefault(number, []).append(value)
        return found

    def evaluate(self, backend: Backend) -> dict[str, float]:
        """Return the metrics of the validation set, all its pairs alike."""
        if self.validation is None:
            return {}
        micros = self._share(self.validation, range(len(self.validation)), backend)
        return self.held_out_metrics(backend, micros)

    def samples(self, backend: Backend, step: int) -> list[dict[str, Any]]:
        """Continue the first held-out prompts at each evaluation."""
        every = self.cfg.eval_every
        if step != self.total_steps and (every is None or step % every):
            return []
        records = []
        for prompt in self._sample_prompts():
            records += continuations(
                backend,
                self.tokenizer,
                self.tokenizer.decode(prompt),
                prompt,
                seed=self.recipe.seed + step,
                max_tokens=min(SAMPLE_TOKENS, self.recipe.model.max_length - len(prompt)),
            )
        return records

    def _sample_prompts(self) -> list[list[int]]:
        """Return `num_samples` different prompts from the beginning of the held-out comparisons."""
        comparisons = (self.validation or self.train).comparisons
        first = comparisons[:PROMPTS_LOOKED_AT]
        prompts = dict.fromkeys(tuple(c.ids[0][: c.prompt_length]) for c in first)
        return [list(prompt) for prompt in prompts][: self.cfg.num_samples]

    def save(self, module: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        assert isinstance(module, CausalLMModel)
        module.save_pretrained(folder, weights)
