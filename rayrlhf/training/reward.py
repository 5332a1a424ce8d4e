"""The reward model: the SFT model's trunk with a scalar head, trained on ranked completions.

InstructGPT (arXiv:2203.02155, section 3.5 and eq. 1): all pairs of one prompt's K responses are
one batch element, one epoch. Ties give no pair. At the end the mean score of the demonstrations is
stored as the model's shift, so that they score 0 on average before RL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from rayrlhf.algorithms.ranking import ranking_loss
from rayrlhf.config import Recipe, RewardConfig
from rayrlhf.data import encoded
from rayrlhf.data.datasets import (
    Comparison,
    Example,
    lay_out,
    number_documents,
    pad,
    shard,
)
from rayrlhf.data.encoded import Encoded, token_counts
from rayrlhf.data.packing import microbatches, pack_tight, within_budget
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores
from rayrlhf.training.backend import Backend
from rayrlhf.training.loop import train_stage
from rayrlhf.training.stage import MicroBatch, Stage, evaluating, global_totals


def train_reward(recipe: Recipe) -> Path:
    """Train the reward model on comparisons; return its folder.

    Raises RecipeError when a record is wrong or the start model does not fit.
    """
    return train_stage(recipe, RewardStage)


@dataclass(frozen=True)
class ComparisonBatch(MicroBatch):
    """All N responses of some comparisons, packed; `count` is comparisons with a pair."""

    ends: Tensor
    """(N,) int64, where the last token of each response is in the flattened (b * S)"""
    ranks: Tensor
    """(N,) int64, 1 = best of its comparison"""
    groups: Tensor
    """(N,) int64, which comparison a response belongs to"""

    @property
    def num_outputs(self) -> int:
        return len(self.ends)


class RewardStage(Stage):
    """Comparisons; each stays whole within one micro-batch."""

    name = "reward"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.start = self.start_folder()
        self.train = self._read(self.cfg.train)
        held_out = self.cfg.validation
        self.validation: Sequence[Comparison] = self._read(held_out) if held_out else []
        path = self.cfg.demonstrations or (recipe.sft.train if recipe.sft else None)
        self.demonstrations: Sequence[Example] = self.read_demonstrations(path) if path else []

    def _read(self, path: str) -> Encoded[Comparison]:
        return encoded.comparisons(self.recipe, path, self.recipe.model.max_length)

    @property
    def cfg(self) -> RewardConfig:
        assert self.recipe.reward is not None
        return self.recipe.reward

    @property
    def num_records(self) -> int:
        return len(self.train)

    def build(self, checkpoint: Path | None) -> ScalarHeadModel:
        return ScalarHeadModel.to_finetune(
            self.start, self.cfg, checkpoint=checkpoint, seed=self.recipe.seed
        )

    def costs(self, indices: Sequence[int]) -> list[float]:
        return [float(self.train.lengths[index]) for index in indices]

    def microbatches(self, indices: Sequence[int]) -> list[ComparisonBatch]:
        return self._cut([self.train[index] for index in indices])

    def _cut(self, comparisons: Sequence[Comparison]) -> list[ComparisonBatch]:
        groups = within_budget(
            [sum(map(len, c.ids)) for c in comparisons], self.cfg.tokens_per_microbatch
        )
        return [self._batch([comparisons[index] for index in group]) for group in groups]

    def _batch(self, comparisons: Sequence[Comparison]) -> ComparisonBatch:
        responses = [
            (ids, rank, group)
            for group, comparison in enumerate(comparisons)
            for ids, rank in zip(comparison.ids, comparison.ranks, strict=True)
        ]
        rows = pack_tight([len(ids) for ids, _, _ in responses], self.cfg.tokens_per_microbatch)
        texts = [[responses[index][0] for index in row] for row in rows]
        input_ids = lay_out(texts, self.tokenizer.pad_token_id)  # (b, S)
        ends = [
            number * input_ids.shape[1] + end - 1
            for number, row in enumerate(texts)
            for end in accumulate(map(len, row))
        ]
        order = [index for row in rows for index in row]
        return ComparisonBatch(
            input_ids,
            number_documents(texts),
            float(len(comparisons)),
            sum(len(ids) for ids, _, _ in responses),
            torch.tensor(ends),
            torch.tensor([responses[index][1] for index in order]),
            torch.tensor([responses[index][2] for index in order]),
        )

    def empty(self) -> ComparisonBatch:
        one = torch.ones(1, dtype=torch.int64)
        return ComparisonBatch(one[None] * 0, one[None], 0.0, 0, one * 0, one, one)

    def loss(self, backend: Backend, micro: ComparisonBatch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = backend(micro.input_ids, micro.attention_mask)  # (b, S)
        scores = outputs.flatten()[micro.ends]  # (N,)
        return ranking_loss(scores, micro.ranks, micro.groups)

    def metrics(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        pairs = max(sums["reward/num_pairs"], 1.0)
        return {
            "loss": sums["reward/loss"] / max(count, 1.0),
            "pair_accuracy": sums["reward/num_correct"] / pairs,
            "num_pairs": sums["reward/num_pairs"],
        }

    def evaluate(self, backend: Backend) -> dict[str, float]:
        """Return eval/loss and eval/pair_accuracy (all pairs alike) on the validation set."""
        if not self.validation:
            return {}
        mine = shard(
            range(len(self.validation)),
            backend.data_rank,
            backend.data_size,
            token_counts(self.validation),
        )
        micros = self._cut([self.validation[index] for index in mine])
        with evaluating(backend):
            sums, count = global_totals(self, backend, micros)
        return {f"eval/{name}": value for name, value in self.metrics(sums, count).items()}

    def finish(self, backend: Backend) -> None:
        """Store the mean score of the demonstrations as the model's shift."""
        module = backend.module
        assert isinstance(module, ScalarHeadModel)
        if self.demonstrations:
            module.shift += self.mean_score(backend, self.demonstrations)

    def mean_score(self, backend: Backend, examples: Sequence[Example]) -> float:
        """Return the mean score of demonstrations over all ranks; every rank calls it."""
        lengths = token_counts(examples)
        mine = shard(range(len(examples)), backend.data_rank, backend.data_size, lengths)
        groups = microbatches([lengths[index] for index in mine], self.cfg.tokens_per_microbatch)
        wanted = int(backend.global_max(len(groups)))
        total = 0.0
        with evaluating(backend):
            for group in groups:
                input_ids, attention_mask = pad(
                    [examples[mine[index]].ids for index in group], self.tokenizer.pad_token_id
                )
                outputs = backend(input_ids.to(backend.device), attention_mask.to(backend.device))
                ends = attention_mask.sum(dim=1).to(backend.device)
                total += float(last_scores(outputs, ends).sum())
            for _ in range(wanted - len(groups)):
                idle = self.empty().to(backend.device)
                backend(idle.input_ids, idle.attention_mask)
        return backend.global_sum(total) / len(examples)

    def save(self, module: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        assert isinstance(module, ScalarHeadModel)
        module.save_pretrained(folder, weights)
