"""The comparison of the stages."""

from typing import Self

from pydantic import model_validator

from rayrlhf.config.cost import FewShotConfig, OveroptimisationConfig, VarietyConfig
from rayrlhf.config.judges import JudgeConfig, check_contestants, check_judges
from rayrlhf.config.section import Positive, PositiveFloat, Section


class EvaluateConfig(Section):
    """Comparison of the stages on the same held-out prompts."""

    prompts: str
    """Held-out prompts, never used in PPO."""
    comparisons: str
    """Held-out comparisons, for the reward model."""
    num_prompts: Positive = 200
    max_response_tokens: Positive = 32
    temperature: PositiveFloat = 1.0
    batch_size: Positive = 16
    """Sequences of model.max_length that one forward pass holds; bounds memory, not the result.
    More is no faster on a CPU."""
    memory_gib: PositiveFloat = 0.5
    """KV cache of the engine that answers the prompts, GiB."""
    num_samples: Positive = 12
    """Prompts whose answers are shown side by side in the report."""
    few_shot: FewShotConfig | None = None
    """Adds the prompted base model to the win rates; `{}` takes the defaults."""
    variety: VarietyConfig | None = None
    """Counts different answers to one prompt; `{}` takes the defaults."""
    overoptimisation: OveroptimisationConfig | None = None
    """Proxy against gold reward; `{}` takes the defaults. It takes minutes: PPO's checkpoints and
    best-of-n answer some thousand prompts."""
    models: dict[str, str] = {}
    """Further models for the battles: name -> folder, hub name or `builtin:` name, each with a
    tokenizer of its own. Prompts with `messages` are put to it in its own chat template."""
    judges: tuple[JudgeConfig, ...] = ()
    """Judges of the battles beside VADER and the run's own reward model."""

    @model_validator(mode="after")
    def _battles_fit(self) -> Self:
        check_contestants(self.models)
        check_judges(self.judges)
        return self
