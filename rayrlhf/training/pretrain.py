"""Pretraining: next-token prediction on rows of T tokens packed from the mixture of sources.

As in GPT-3 a row runs over the ends of documents, with end-of-text between them, and every token
but a row's first is predicted; with `pretrain.documents: apart` documents do not see each other.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rayrlhf.config import PretrainConfig, Recipe, RecipeError
from rayrlhf.data import builtin
from rayrlhf.data.datasets import shard
from rayrlhf.data.row_masks import row_masks
from rayrlhf.data.rows import PackedRows, check_shards, read_manifest
from rayrlhf.data.tokenizer import encode_text
from rayrlhf.models.causal_lm import CausalLMModel, build_causal_lm
from rayrlhf.training.backend import Backend, warmup_steps
from rayrlhf.training.language_model import LanguageModelStage, TextBatch, continuations
from rayrlhf.training.loop import train_stage
from rayrlhf.training.schedule import BatchSizes, warmup_cosine
from rayrlhf.training.spikes import SpikeGuard


def pretrain(recipe: Recipe) -> Path:
    """Train the base model on the packed corpus; return its folder.

    Raises RecipeError when the corpus is missing or the tokenizer does not fit the model.
    """
    return train_stage(recipe, PretrainStage)


class PretrainStage(LanguageModelStage):
    """Rows of the corpus, each one sequence."""

    name = "pretrain"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        corpus = self.cfg.corpus or str(recipe.path / "corpus")
        manifest = read_manifest(corpus)
        check_shards(corpus, manifest)
        self._check_tokenizer(corpus, manifest)
        self.rows = PackedRows(corpus, "train")
        self.held_out = {
            split.removeprefix("validation-"): PackedRows(corpus, split)
            for split in manifest["splits"]
            if split.startswith("validation-")
        }
        if self.cfg.early_stopping is not None and not self.held_out:
            raise RecipeError(
                f"pretrain.early_stopping compares losses on held-out rows, but {corpus} has none: "
                "give the sources `validation` files, or take early_stopping out"
            )
        self.start = self.cfg.init or recipe.model.path
        if self.start is not None:
            self.start = builtin.resolve(self.start)
            self.check_model(self.start)
        spikes = self.cfg.loss_spike
        self.spikes = SpikeGuard(spikes) if spikes is not None else None

    @property
    def cfg(self) -> PretrainConfig:
        assert self.recipe.pretrain is not None
        return self.recipe.pretrain

    @property
    def num_records(self) -> int:
        return len(self.rows)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Records of each step; a ramp's tokens are taken as whole rows of the corpus."""
        cfg = self.cfg
        if cfg.batch_ramp_tokens is None:
            return BatchSizes(cfg.batch_size)
        ramp = -(-cfg.batch_ramp_tokens // self.rows.row_length)
        return BatchSizes(cfg.batch_size, cfg.batch_size_start, ramp)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0), by tokens where the recipe gives them.

        The tokens are those of the rows, filling included.
        """
        cfg = self.cfg
        if cfg.warmup_tokens is None and cfg.decay_tokens is None:
            return super().learning_rate(step)

        def tokens(step: int) -> int:
            return self.batch_sizes.before(step) * self.rows.row_length

        warmup = cfg.warmup_tokens
        if warmup is None:
            warmup = tokens(warmup_steps(cfg, self.total_steps))
        end = cfg.decay_tokens
        return warmup_cosine(
            tokens(step),
            tokens(step + 1),
            peak=cfg.learning_rate,
            warmup=warmup,
            end=tokens(self.total_steps - 1) if end is None else end,
            floor=cfg.min_learning_rate_ratio,
        )

    def build(self, checkpoint: Path | None) -> CausalLMModel:
        start = checkpoint or self.start
        if start is not None:
            return CausalLMModel.from_pretrained(start, dropout=self.cfg.dropout)
        model = build_causal_lm(
            self.recipe.model,
            vocab_size=len(self.tokenizer),
            seed=self.recipe.seed,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            dropout=self.cfg.dropout,
        )
        return CausalLMModel(model)

    def _check_tokenizer(self, corpus: str, manifest: dict[str, Any]) -> None:
        core = self.tokenizer.backend_tokenizer
        own = (core.get_vocab_size(), self.tokenizer.eos_token_id)
        if own != (manifest["vocab_size"], manifest["eos_id"]):
            raise RecipeError(
                f"{corpus} was written with a tokenizer of {manifest['vocab_size']} ids and "
                f"end-of-text {manifest['eos_id']}, but this run's has {own[0]} and {own[1]}: set "
                "tokenizer.path to the corpus's tokenizer"
            )

    def costs(self, indices: Sequence[int]) -> None:
        """Rows are all of one length."""

    def microbatches(self, indices: Sequence[int]) -> list[TextBatch]:
        return self._cut(self.rows, indices)

    def _cut(self, rows: PackedRows, indices: Sequence[int]) -> list[TextBatch]:
        size = max(1, self.cfg.tokens_per_microbatch // rows.row_length)
        return [
            self._batch(rows[indices[start : start + size]])
            for start in range(0, len(indices), size)
        ]

    def _batch(self, rows: torch.Tensor) -> TextBatch:
        """Return rows (n, T) as a micro-batch."""
        attention_mask, loss_mask = row_masks(
            rows, self.tokenizer.eos_token_id, apart=self.cfg.documents == "apart"
        )
        num_tokens = int((attention_mask > 0).sum())
        return TextBatch(rows, attention_mask, float(loss_mask.sum()), num_tokens, loss_mask)

    def evaluate(self, backend: Backend) -> dict[str, float]:
        """Return eval/loss over all held-out rows, and eval/loss.<source>."""
        metrics = {}
        total_loss = total_tokens = 0.0
        for name, rows in self.held_out.items():
            mine = shard(range(len(rows)), backend.data_rank, backend.data_size)
            loss, tokens = self.mean_loss(backend, self._cut(rows, mine))
            if tokens:
                metrics[f"eval/loss.{name}"] = loss / tokens
            total_loss, total_tokens = total_loss + loss, total_tokens + tokens
        if total_tokens:
            metrics["eval/loss"] = total_loss / total_tokens
        return metrics

    def norm_limit(self, metrics: Mapping[str, float]) -> float:
        return math.inf if self.spikes is None else self.spikes.norm_limit(metrics["loss"])

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        """Return the spike that step `step` was skipped for, with the rows of its batch."""
        if self.spikes is None:
            return None
        skip = self.spikes.observe(step, metrics["loss"], metrics["grad_norm"])
        if skip is None:
            return None
        rows = self.batch(step - 1)
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        return {
            "text": f"skipped: {skip.what} {skip.value:.4g} is above {skip.limit:.4g}; "
            f"{len(rows)} rows of the corpus: {shown}",
            "what": skip.what,
            "value": skip.value,
            "limit": skip.limit,
            "rows": rows,
        }

    def save_state(self, folder: Path) -> None:
        if self.spikes is not None:
            self.spikes.save(folder)

    def load_state(self, folder: Path) -> None:
        if self.spikes is not None:
            self.spikes.load(folder)

    def samples(self, backend: Backend, step: int) -> list[dict[str, Any]]:
        """Continue every sample prompt, at `num_samples` steps of the run."""
        if step not in log_spaced(self.cfg.num_samples, self.total_steps):
            return []
        records = []
        for prompt in self.cfg.sample_prompts:
            ids = encode_text(self.tokenizer, prompt)
            records += continuations(
                backend, self.tokenizer, prompt, ids, seed=self.recipe.seed + step
            )
        return records


def log_spaced(num: int, last: int) -> list[int]:
    """Return `num` steps (or all, if they are fewer), from 1 to `last` evenly by their logarithm.

    One is the last step only. Where rounding would join two, the later one moves on.
    """
    num = min(num, last)
    if num == 1:
        return [last]
    steps: list[int] = []
    for i in range(num):
        steps.append(max(round(last ** (i / (num - 1))), steps[-1] + 1 if steps else 1))
    return steps
