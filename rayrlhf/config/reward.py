"""The reward model's section."""

from typing import Literal, Self

from pydantic import model_validator

from rayrlhf.config.section import NonNegative, Positive, PositiveFloat, Section
from rayrlhf.config.training import EarlyStopping, RecordsConfig


class GoldConfig(Section):
    """Data of the gold reward model; everything else is as for the others."""

    train: str
    """Comparisons that have no text in common with those of `reward.train`."""
    validation: str | None = None
    """Held-out comparisons, none of them of `reward.validation`."""


class RewardConfig(RecordsConfig):
    """Reward model on ranked completions."""

    train: str
    """Comparisons: `prompt`, `responses` (K = 2 to 9), `ranks` (1 = best, ties allowed), and
    perhaps `ratings` and `single_ratings`."""
    demonstrations: str | None = None
    """Records whose mean score is shifted to 0; None takes `sft.train`."""
    batch_size: Positive = 64
    """Prompts per step (InstructGPT appendix C.2)."""
    learning_rate: PositiveFloat = 9e-6
    """InstructGPT appendix C.2."""
    epochs: PositiveFloat = 1
    """More overfits (InstructGPT appendix C.2)."""
    early_stopping: EarlyStopping | None = EarlyStopping()
    """On the accuracy on `validation`; only where that and `eval_every` are set."""
    loss: Literal["kwise", "pairwise", "margin"] = "kwise"
    """`kwise`: every prompt weighs the same, however many pairs its K responses make
    (InstructGPT eq. 1). `pairwise`: every pair does (Bradley-Terry). `margin`: so, with a margin
    that grows with the gap of the ratings (Llama 2, arXiv:2307.09288, eq. 2)."""
    margin_scale: PositiveFloat = 1 / 3
    """With loss=margin: score margin per point of the gap of `ratings`, of `ranks` where a record
    has none. Llama 2's smaller one is a third per step of its scale (appendix A.3.3)."""
    center_coef: NonNegative = 0.0
    """Weight of the squared sum of a pair's scores, which keeps them near 0 (arXiv:2312.09244:
    0.01)."""
    ties: Literal["ignore", "half"] = "ignore"
    """Equal ranks: no pair, or a pair of which each side is preferred half the time.
    Only with raters=mean."""
    raters: Literal["mean", "individual"] = "mean"
    """What a pair's target is: its order by `ranks`, or the share of people's single judgements
    (`single_ratings`) for it, equal ones half."""
    num_members: Positive = 1
    """Reward models to train, one after another, with heads and batches of seeds of their own.
    PPO takes the first; the evaluation reports what they agree on."""
    gold: GoldConfig | None = None
    """One more reward model, on other comparisons, that PPO never sees: evaluate.overoptimisation
    tells by it where more of PPO's reward is worth less (arXiv:2210.10760)."""

    @model_validator(mode="after")
    def _targets_fit(self) -> Self:
        if self.loss == "margin" and self.raters == "individual":
            raise ValueError(
                "loss=margin needs to know which of two responses is the better one, and "
                "raters=individual only how many people think so: set raters=mean or loss=pairwise"
            )
        if self.gold is not None and self.gold.train == self.train:
            raise ValueError(
                f"reward.gold.train={self.gold.train} is reward.train: the gold reward model has "
                "to learn from other comparisons; split them, so that no text is in both"
            )
        return self
