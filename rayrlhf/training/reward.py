"""The reward model: the SFT model's trunk with a scalar head, trained on ranked completions.

InstructGPT (arXiv:2203.02155, section 3.5 and eq. 1): all pairs of one prompt's K responses are
one batch element, one epoch. Other losses and targets: config/reward.py; whatever the pairs, each
response takes one forward pass. At the end the mean score of the demonstrations is stored as the
model's shift, so that they score 0 on average before RL.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from rayrlhf import lineage
from rayrlhf.algorithms.ranking import (
    Pairs,
    joined,
    judged_pairs,
    pair_loss,
    ranked_pairs,
    weighted,
)
from rayrlhf.config import GoldConfig, Recipe, RecipeError, RewardConfig
from rayrlhf.data import encoded
from rayrlhf.data.datasets import (
    Comparison,
    Example,
    iter_records,
    lay_out,
    number_documents,
    pad,
)
from rayrlhf.data.encoded import Encoded
from rayrlhf.data.packing import microbatches, pack_tight, within_budget
from rayrlhf.data.records import identity
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores
from rayrlhf.training.backend import Backend
from rayrlhf.training.best import Selection
from rayrlhf.training.loop import train_stage
from rayrlhf.training.stage import MicroBatch, Stage, evaluating, own_share


def train_reward(recipe: Recipe) -> Path:
    """Train the reward model on comparisons; return its folder.

    Raises RecipeError when a record is wrong or the start model does not fit.
    """
    assert recipe.reward is not None
    if recipe.reward.gold is not None:
        check_gold(recipe.reward, recipe.reward.gold)
    return train_stage(recipe, RewardStage)


@dataclass(frozen=True)
class ComparisonBatch(MicroBatch):
    """All N responses of some comparisons, packed; `count` is comparisons, or pairs."""

    ends: Tensor
    """(N,) int64, where the last token of each response is in the flattened (b * S)"""
    pairs: Pairs

    def to(self, device: torch.device) -> Self:
        return replace(super().to(device), pairs=self.pairs.to(device))

    @property
    def num_outputs(self) -> int:
        return len(self.ends)


class RewardStage(Stage):
    """Comparisons; each stays whole within one micro-batch."""

    name = "reward"
    selection = Selection("eval/pair_accuracy", higher_is_better=True)

    def __init__(self, recipe: Recipe, number: int = 0) -> None:
        """Read and check the data; `number` is which one of `finals` this is."""
        super().__init__(recipe)
        if number:
            self.folder = self.finals(recipe)[number].parent
            self.recipe = recipe.model_copy(
                update={
                    "seed": member_seed(recipe.seed, number),
                    "reward": _section(self.cfg, number),
                }
            )
        self.start = self.start_folder()
        self.train = self._read(self.cfg.train)
        held_out = self.cfg.validation
        self.validation: Sequence[Comparison] = self._read(held_out) if held_out else []
        path = self.cfg.demonstrations or (recipe.sft.train if recipe.sft else None)
        self.demonstrations: Sequence[Example] = self.read_demonstrations(path) if path else []

    @classmethod
    def runs(cls, recipe: Recipe) -> Iterator["RewardStage"]:
        """Yield the members of the ensemble, and the gold model."""
        return (cls(recipe, number) for number in range(len(cls.finals(recipe))))

    @classmethod
    def finals(cls, recipe: Recipe) -> list[Path]:
        return [recipe.path / name for name in lineage.outputs_of(recipe, "reward")]

    def _read(self, path: str) -> Encoded[Comparison]:
        individual = self.cfg.raters == "individual"
        return encoded.comparisons(
            self.recipe,
            path,
            self.recipe.model.max_length,
            keep_ties=individual or self.cfg.ties == "half",
            need_single_ratings=individual,
        )

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
        responses = [ids for comparison in comparisons for ids in comparison.ids]
        rows = pack_tight([len(ids) for ids in responses], self.cfg.tokens_per_microbatch)
        texts = [[responses[index] for index in row] for row in rows]
        input_ids = lay_out(texts, self.tokenizer.pad_token_id)  # (b, S)
        ends = [
            number * input_ids.shape[1] + end - 1
            for number, row in enumerate(texts)
            for end in accumulate(map(len, row))
        ]
        # Scores are read in the order of the responses, wherever packing has put them.
        order = [index for row in rows for index in row]
        ends = [end for _, end in sorted(zip(order, ends, strict=True))]
        pairs = self._pairs(comparisons)
        return ComparisonBatch(
            input_ids,
            number_documents(texts),
            float(len(comparisons) if self.cfg.loss == "kwise" else len(pairs.first)),
            sum(map(len, responses)),
            torch.tensor(ends),
            pairs,
        )

    def _pairs(self, comparisons: Sequence[Comparison]) -> Pairs:
        """Return the pairs of responses, numbered through over the comparisons."""
        cfg = self.cfg
        counts = [len(comparison.ranks) for comparison in comparisons]
        groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        if cfg.raters == "individual":
            parts = [judged_pairs(torch.tensor(c.ranks), c.single_ratings) for c in comparisons]
            pairs = joined(parts, [0, *accumulate(counts)][:-1])
        else:
            values = [c.ratings or [-float(rank) for rank in c.ranks] for c in comparisons]
            pairs = ranked_pairs(
                torch.tensor([rank for c in comparisons for rank in c.ranks]),
                groups,
                ties=cfg.ties,
                ratings_N=torch.tensor([value for one in values for value in one]),
                margin_scale=cfg.margin_scale if cfg.loss == "margin" else 0.0,
            )
        return weighted(pairs, groups, per="prompt" if cfg.loss == "kwise" else "pair")

    def empty(self) -> ComparisonBatch:
        one = torch.ones(1, dtype=torch.int64)
        return ComparisonBatch(one[None] * 0, one[None], 0.0, 0, one * 0, ranked_pairs(one, one))

    def loss(self, backend: Backend, micro: ComparisonBatch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = backend(micro.input_ids, micro.attention_mask)  # (b, S)
        scores = outputs.flatten()[micro.ends]  # (N,)
        return pair_loss(scores, micro.pairs, center_coef=self.cfg.center_coef)

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
        return self.held_out_metrics(backend, self._cut(own_share(backend, self.validation)))

    def finish(self, backend: Backend) -> None:
        """Store the mean score of the demonstrations as the model's shift."""
        module = backend.module
        assert isinstance(module, ScalarHeadModel)
        if self.demonstrations:
            module.shift += self.mean_score(backend, self.demonstrations)

    def mean_score(self, backend: Backend, examples: Sequence[Example]) -> float:
        """Return the mean score of demonstrations over all ranks; every rank calls it."""
        mine = [example.ids for example in own_share(backend, examples)]
        groups = microbatches([len(ids) for ids in mine], self.cfg.tokens_per_microbatch)
        wanted = int(backend.global_max(len(groups)))
        total = 0.0
        with evaluating(backend):
            for group in groups:
                input_ids, attention_mask = pad(
                    [mine[index] for index in group], self.tokenizer.pad_token_id
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


def _section(cfg: RewardConfig, number: int) -> RewardConfig:
    """Return the section of a further model: the gold model, behind the members, has own data."""
    if number < cfg.num_members:
        return cfg
    assert cfg.gold is not None
    return cfg.model_copy(update=cfg.gold.model_dump())


def check_gold(cfg: RewardConfig, gold: GoldConfig) -> None:
    """Raise RecipeError when a text of the gold model's comparisons is in the proxy's, too."""
    known = _texts(cfg.train) | _texts(cfg.validation)
    for path in (gold.train, gold.validation):
        shared = known & _texts(path)
        if shared:
            prompt, response = min(shared)
            raise RecipeError(
                f"{path}: {len(shared)} of its texts are in the comparisons of the reward model "
                f"that it is to judge, for example {(prompt + response)[:80]!r}: split the "
                "comparisons, so that no text is in both"
            )


def _texts(path: str | None) -> set[tuple[str, str]]:
    if path is None:
        return set()
    return {
        (identity(record), response)
        for record in iter_records(path, "comparison")
        for response in record["responses"]
    }


def member_seed(seed: int, member: int) -> int:
    """Return the seed of a further member of the ensemble: far from those of other runs."""
    digest = hashlib.sha256(f"{seed}/member/{member}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
