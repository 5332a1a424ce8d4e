"""Iterated RLHF: rounds of new comparisons, a reward model of all of them, and more PPO."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.judges import JudgeConfig, check_judge
from rayrlhf.config.section import Positive, PositiveFloat, Section


class RoundsConfig(Section):
    """Rounds that follow PPO (InstructGPT section 3.1: its steps 2 and 3 "can be iterated").

    A round samples answers of the policy before it, has them judged, trains a new reward model on
    all comparisons so far, and goes on with PPO. `rounds: 2` is short for `{num_rounds: 2}`.
    """

    num_rounds: Annotated[int, Field(ge=1, le=99)]
    judge: Literal["people", "vader"] | JudgeConfig = "people"
    """`people`: on the page of `rayrlhf label`, for which the run waits without a process of its
    own. `vader`: VADER's rules. Or one of `model`, `function` and `url`, as in `evaluate.judges`;
    a language model sees every pair of a prompt's answers in both orders."""
    prompts: str | None = None
    """Prompts to answer: `prompt`, or `messages`; None takes those of `ppo.prompts`."""
    num_prompts: Positive = 256
    """Of each round."""
    num_responses: Annotated[int, Field(ge=2, le=9)] = 4
    """K: answers to each prompt."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a round's prompts that no reward model trains on: there the reward models before
    and after the round are compared."""
    deadline_s: PositiveFloat = 3600
    """Longest that the sampling of a round may take."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_number(cls, tree: Any) -> Any:
        return {"num_rounds": tree} if isinstance(tree, int) else tree

    @field_validator("judge", mode="before")
    @classmethod
    def _is_a_judge(cls, judge: Any) -> Any:
        if isinstance(judge, str) and judge not in ("people", "vader"):
            raise ValueError(
                f"rounds.judge={judge}: it is people, vader, or a section with one of model, "
                "function and url"
            )
        return judge

    @field_validator("judge")
    @classmethod
    def _can_judge(cls, judge: str | JudgeConfig) -> str | JudgeConfig:
        if isinstance(judge, JudgeConfig):
            check_judge("rounds.judge", judge)
        return judge
