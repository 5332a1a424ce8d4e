"""Supervised fine-tuning on demonstrations, with the loss on the response alone.

InstructGPT (arXiv:2203.02155, section 3.5): 16 epochs, cosine decay, residual dropout of 0.2. It
chose the checkpoint by the reward model's score; here the last one is taken.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from rayrlhf import lineage
from rayrlhf.config import Recipe, SFTConfig
from rayrlhf.data import builtin
from rayrlhf.data.datasets import Example, encode_demonstrations, pad, read_records, shard
from rayrlhf.data.packing import microbatches
from rayrlhf.data.tokenizer import check_vocabulary
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.folder import load_config
from rayrlhf.training.backend import Backend
from rayrlhf.training.language_model import LanguageModelStage, TextBatch
from rayrlhf.training.loop import train_stage


def finetune(recipe: Recipe) -> Path:
    """Fine-tune the base model on demonstrations; return the folder of the SFT model.

    Raises RecipeError when a record is wrong or the start model does not fit.
    """
    return train_stage(recipe, SFTStage)


class SFTStage(LanguageModelStage):
    """Demonstrations, each one sequence: prompt, response, end-of-text."""

    name = "sft"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.start = builtin.resolve(lineage.start_model(recipe, "sft"))
        check_vocabulary(self.tokenizer, load_config(self.start).vocab_size)
        self.train = self._read(self.cfg.train)
        self.validation = self._read(self.cfg.validation) if self.cfg.validation else []

    def _read(self, path: str) -> list[Example]:
        return encode_demonstrations(
            read_records(path, "demonstration"), self.tokenizer, self.recipe.model.max_length
        )

    @property
    def cfg(self) -> SFTConfig:
        assert self.recipe.sft is not None
        return self.recipe.sft

    @property
    def num_records(self) -> int:
        return len(self.train)

    def build(self, checkpoint: Path | None) -> CausalLMModel:
        return CausalLMModel.from_pretrained(checkpoint or self.start, dropout=self.cfg.dropout)

    def costs(self, indices: Sequence[int]) -> list[float]:
        return [float(len(self.train[index].ids)) for index in indices]

    def microbatches(self, indices: Sequence[int]) -> list[TextBatch]:
        return self._cut([self.train[index] for index in indices])

    def _cut(self, examples: Sequence[Example]) -> list[TextBatch]:
        groups = microbatches(
            [len(example.ids) for example in examples], self.cfg.tokens_per_microbatch
        )
        return [self._batch([examples[index] for index in group]) for group in groups]

    def _batch(self, examples: Sequence[Example]) -> TextBatch:
        input_ids, attention_mask = pad(
            [example.ids for example in examples], self.tokenizer.pad_token_id
        )  # (b, S)
        loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, example in enumerate(examples):
            loss_mask[row, : len(example.mask)] = torch.tensor(example.mask, dtype=torch.bool)
        loss_mask[:, 0] = False  # nothing stands before it
        return TextBatch(
            input_ids, attention_mask, float(loss_mask.sum()), int(attention_mask.sum()), loss_mask
        )

    def evaluate(self, backend: Backend) -> dict[str, float]:
        """Return eval/loss: nats per response token of the validation set."""
        if not self.validation:
            return {}
        mine = shard(
            range(len(self.validation)),
            backend.rank,
            backend.world_size,
            [len(example.ids) for example in self.validation],
        )
        micros = self._cut([self.validation[index] for index in mine])
        loss, tokens = self.mean_loss(backend, micros)
        return {"eval/loss": loss / tokens}
