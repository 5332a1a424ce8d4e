"""A trunk with a scalar head: the reward model, and the critic.

One class for both, so that a critic can start as a copy of the reward model. The head gives a
number at every token; the reward model's score is that at the last one, the critic's value of the
state before token t is that at token t - 1. Reward models have a shift, subtracted from every
number, which puts the mean score of the demonstrations at 0 (arXiv:2203.02155, appendix C.2).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from rayrlhf.config import StageConfig
from rayrlhf.models import lora
from rayrlhf.models.folder import (
    add_residual_dropout,
    load_config,
    load_weights,
    run_trunk,
    save_folder,
)
from rayrlhf.models.sequence import WHOLE


class ScalarHeadModel(nn.Module):
    """A Hugging Face sequence classifier with one label, `.hf`, read at every token.

    `shift` is subtracted from what the head says; `score_shift` in config.json keeps it.
    """

    def __init__(self, hf: PreTrainedModel, *, shift: float = 0.0) -> None:
        super().__init__()
        self.hf = hf
        self.hf.score = _Float32Head(hf.score.weight)
        self.shift = shift
        self.sequence = WHOLE

    @classmethod
    def to_finetune(
        cls, start: str | Path, cfg: StageConfig, *, checkpoint: Path | None, seed: int
    ) -> Self:
        """Take a causal LM's trunk and a new head, with what `cfg` adds, or load `checkpoint`.

        Under `cfg.lora` it is always the start model, with new adapters or those of `checkpoint`,
        which hold the head, too.
        """
        if checkpoint is not None and cfg.lora is None:
            return cls.from_pretrained(checkpoint, dropout=cfg.dropout)
        model = cls.from_causal_lm(
            start, seed, dropout=cfg.dropout, quantization=lora.quantization(cfg)
        )
        if cfg.lora is not None:
            lora.add_adapter(model.hf, cfg.lora, base=str(start), seed=seed, folder=checkpoint)
        return model

    @classmethod
    def from_causal_lm(  # noqa: PLR0913 (each is a plain choice)
        cls,
        path: str | Path,
        seed: int = 0,
        *,
        zero_head: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        quantization: Mapping[str, Any] | None = None,
    ) -> Self:
        """Take the trunk of a causal LM and a new head: normal(0, 1 / sqrt(d + 1)), or zeros.

        `zero_head` makes a critic that starts at V = 0. Source of the std: arXiv:2009.01325,
        appendix B.
        """
        config = load_config(path, dropout=dropout, num_labels=1)
        hf = load_weights(
            AutoModelForSequenceClassification,
            path,
            config,
            dtype=dtype,
            may_miss=(lora.HEAD,),
            quantization=quantization,
        )
        add_residual_dropout(hf, dropout)
        weight = hf.score.weight
        std = 0.0 if zero_head else (weight.shape[1] + 1) ** -0.5
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        return cls(hf)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a folder that `save_pretrained` wrote, its shift included.

        Raises RecipeError for a folder without a scalar head, such as a causal LM's.
        """
        config = load_config(path, dropout=dropout, num_labels=1)
        hf = load_weights(AutoModelForSequenceClassification, path, config, dtype=dtype)
        add_residual_dropout(hf, dropout)
        return cls(hf, shift=float(config.to_dict().get("score_shift", 0.0)))

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the HF model."""
        return self.hf.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the head's output minus the shift at every token, float32 (b, S).

        `attention_mask` (b, S) is 1 on tokens and 0 on padding, at either end, where the result
        means nothing.
        """
        hidden = run_trunk(self.hf, input_ids, attention_mask, self.sequence)  # (b, S', d)
        values: Tensor = self.hf.score(hidden).squeeze(-1) - self.shift
        return self.sequence.join(values, input_ids.shape[1])

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write an HF folder, without tokenizer, for AutoModelForSequenceClassification.

        Plain transformers gives the score before the shift. `state_dict` as in
        `CausalLMModel.save_pretrained`.
        """
        self.hf.config.update({"score_shift": self.shift})
        save_folder(self.hf, folder, state_dict)


class _Float32Head(nn.Module):
    """A linear map to one number that is computed in float32, whatever its weight is kept in.

    Differences of scores are small beside the scores: bfloat16 would round them off.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


def last_scores(outputs: Tensor, lengths: Tensor) -> Tensor:
    """Return (b,) the score of each row out of `outputs` (b, S): that at its last token.

    `lengths` (b,) counts the columns up to the last token, which for right-padded rows is the
    number of tokens; `row_ends` finds it for any padding.
    """
    return outputs.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


def row_ends(attention_mask: Tensor) -> Tensor:
    """Return (b,) int64: the number of columns up to the last token of each row (b, S)."""
    columns = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return torch.where(attention_mask > 0, columns, 0).amax(dim=1)


def values_before(outputs: Tensor, positions: Tensor) -> Tensor:
    """Return V of the state before each token, (b, T), out of `outputs` (b, S).

    `positions` (b, T) int64 are the columns of the tokens, from 1 on: the value before token t
    is read at token t - 1, and does not depend on token t.
    """
    return outputs.gather(1, positions - 1)
