"""DPO's section."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Fraction, Positive, PositiveFloat
from rayrlhf.config.training import RecordsConfig


class DPOConfig(RecordsConfig):
    """Direct preference optimization (arXiv:2305.18290) of the SFT model on ranked completions."""

    train: str
    """Comparisons, as of `reward`."""
    loss: Literal["sigmoid", "robust", "ipo", "plackett_luce"] = "sigmoid"
    """`sigmoid` is DPO's own, for all pairs of a comparison; `robust` the one that wrong labels do
    not bias (arXiv:2403.00409); `ipo` arXiv:2310.12036, eq. 17; `plackett_luce` takes the whole
    ranking (DPO appendix A.3), in which tied responses do not compete."""
    beta: PositiveFloat = 0.1
    """Strength of the tie to the start model (DPO appendix B: 0.1); `tau` of IPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Part of the pairs whose order is taken to be wrong (conservative DPO, E. Mitchell 2023); for
    `sigmoid` and `robust`."""
    num_samples: Annotated[int, Field(ge=0)] = 2
    """Held-out prompts whose continuations are printed at each evaluation."""
    batch_size: Positive = 64
    """Prompts per step (DPO appendix B: 64)."""
    learning_rate: PositiveFloat = 1e-6
    """DPO appendix B, there with RMSprop; AdamW scales its steps alike."""
    warmup_ratio: Fraction = 0.1
    """DPO appendix B: 150 steps; a tenth in Zephyr (arXiv:2310.16944)."""

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> Self:
        if self.label_smoothing > 0 and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"dpo.label_smoothing={self.label_smoothing:g} is for pairs with a sigmoid, not "
                f"for dpo.loss={self.loss}: set dpo.loss=sigmoid or robust, or label_smoothing=0"
            )
        return self
