"""Supervised fine-tuning on demonstrations, with the loss on the response alone.

InstructGPT (arXiv:2203.02155, section 3.5): 16 epochs, cosine decay, residual dropout of 0.2. It
chose the checkpoint by the reward model's score; here the last one is taken.
"""

from collections.abc import Sequence
from pathlib import Path

from rayrlhf.config import Recipe, SFTConfig
from rayrlhf.data.datasets import (
    Example,
    lay_out,
    number_documents,
)
from rayrlhf.data.packing import even_parts, pack_tight
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.training.backend import Backend
from rayrlhf.training.language_model import LanguageModelStage, TextBatch
from rayrlhf.training.loop import train_stage
from rayrlhf.training.stage import own_share


def finetune(recipe: Recipe) -> Path:
    """Fine-tune the base model on demonstrations; return the folder of the SFT model.

    Raises RecipeError when a record is wrong or the start model does not fit.
    """
    return train_stage(recipe, SFTStage)


class SFTStage(LanguageModelStage):
    """Demonstrations: prompt, response, end-of-text; several to a row, none sees another."""

    name = "sft"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.start = self.start_folder()
        self.train = self.read_demonstrations(self.cfg.train)
        held_out = self.cfg.validation
        self.validation: Sequence[Example] = self.read_demonstrations(held_out) if held_out else []

    @property
    def cfg(self) -> SFTConfig:
        assert self.recipe.sft is not None
        return self.recipe.sft

    @property
    def num_records(self) -> int:
        return len(self.train)

    def build(self, checkpoint: Path | None) -> CausalLMModel:
        model = CausalLMModel.to_finetune(
            self.start, self.cfg, checkpoint=checkpoint, seed=self.recipe.seed
        )
        if self.cfg.neftune_alpha > 0:
            model.add_noise(self.cfg.neftune_alpha)
        return model

    def costs(self, indices: Sequence[int]) -> list[float]:
        return [float(self.train.lengths[index]) for index in indices]

    def microbatches(self, indices: Sequence[int]) -> list[TextBatch]:
        return self._cut([self.train[index] for index in indices])

    def _cut(self, examples: Sequence[Example]) -> list[TextBatch]:
        lengths = [len(example.ids) for example in examples]
        budget = self.cfg.tokens_per_microbatch
        rows = pack_tight(lengths, budget)
        width = max((sum(lengths[index] for index in row) for row in rows), default=1)
        return [
            self._batch([[examples[index] for index in rows[number]] for number in part])
            for part in even_parts(len(rows), max(1, budget // width))
        ]

    def _batch(self, rows: Sequence[Sequence[Example]]) -> TextBatch:
        ids = [[example.ids for example in row] for row in rows]
        # Nothing stands before a first token: it is never predicted.
        loss_mask = lay_out([[[0, *example.mask[1:]] for example in row] for row in rows], 0).bool()
        return TextBatch(
            lay_out(ids, self.tokenizer.pad_token_id),
            number_documents(ids),
            float(loss_mask.sum()),
            sum(len(sequence) for row in ids for sequence in row),
            loss_mask,
        )

    def evaluate(self, backend: Backend) -> dict[str, float]:
        """Return eval/loss: nats per response token of the validation set."""
        if not self.validation:
            return {}
        micros = self._cut(own_share(backend, self.validation))
        loss, tokens = self.mean_loss(backend, micros)
        return {"eval/loss": loss / tokens}
