"""What the evaluation measures of the price of RLHF."""

from typing import Annotated

from pydantic import Field

from rayrlhf.config.section import Positive, Section


class FewShotConfig(Section):
    """The base model with demonstrations before the prompt, as GPT-3 is in InstructGPT's figures.

    It needs `sft.train`, which the demonstrations come from.
    """

    demonstrations: Positive = 4
    """k: drawn by the seed, anew for every prompt; as many of them as fit before it."""
    separator: Annotated[str, Field(min_length=1)] | None = "\n\n"
    """Between two demonstrations, and where the answer is cut; null is the end-of-text token, with
    which a corpus of such texts was packed."""


class VarietyConfig(Section):
    """Many answers of every model to one prompt, for some of the prompts."""

    prompts: Positive = 8
    samples: Annotated[int, Field(ge=2)] = 50
    """Answers to each of them."""


class OveroptimisationConfig(Section):
    """Proxy and gold reward over sqrt(KL) of PPO's checkpoints and of best-of-n (arXiv:2210.10760).

    Unlike there, both reward models learn from people, on comparisons that have no text in common.
    """

    gold: str | None = None
    """Folder of a finished reward model that PPO's never shared a comparison with; null takes the
    one that `reward.gold` trains."""
    prompts: Positive = 64
    """Of evaluate.prompts, the first ones."""
    samples: Annotated[int, Field(ge=2)] = 64
    """Answers of the reference to each prompt: N, of which best-of-n takes n = 1, 2, 4, ... N."""
    checkpoint_samples: Positive = 8
    """Answers of each of PPO's checkpoints to each prompt. The checkpoints are those that
    ppo.keep_checkpoints leaves."""
