"""How far rollouts may run ahead of the learner, and how what is stale is corrected."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import PositiveFloat, Section

ImportanceMode = Literal["token", "token_mask", "sequence", "sequence_mask"]
DEFAULT_CAP = 2.0


class AsynchronyConfig(Section):
    """The keys of `ppo` about rollouts that run while the learner trains."""

    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Versions of the weights that a response may be behind those that learn from it. 0 rolls out,
    then learns; n rolls out the next n batches meanwhile (n = 1 hides the shorter of the two)."""
    stale: Literal["wait", "drop"] = "wait"
    """`wait`: every step learns from its own batch, which starts no earlier than n versions before:
    reproducible. `drop`: a step learns from what is ready, whichever engine made it; what came too
    late is dropped, and its prompts are rolled out again."""
    interrupt: bool = False
    """New weights reach the engines in the middle of their responses, which go on under them; the
    tokens before keep their log-probs. False: a response is finished by the weights it began with.
    Not reproducible."""
    importance_cap: PositiveFloat | None = None
    """Cap of the weight pi_learner / pi_engine of a token's advantage (truncated importance
    sampling). None: 2 when max_staleness is above 0, else no weight."""
    importance_mode: ImportanceMode = "token"
    """A weight per token, or one per response (the product over its tokens); what is above the cap
    is cut to it, or with `_mask` left out."""

    @property
    def cap(self) -> float | None:
        """The cap in force; None for no correction."""
        if self.importance_cap is None and self.max_staleness:
            return DEFAULT_CAP
        return self.importance_cap

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        if not self.max_staleness:
            for key, value in (("stale", self.stale), ("interrupt", self.interrupt)):
                if value not in ("wait", False):
                    raise ValueError(
                        f"ppo.{key}={str(value).lower()} has no effect while every rollout waits "
                        "for the update before it: set ppo.max_staleness=1"
                    )
        if self.cap is None and self.importance_mode != "token":
            raise ValueError(
                f"ppo.importance_mode={self.importance_mode} has no effect without a cap: set "
                f"ppo.importance_cap={DEFAULT_CAP:g}"
            )
        return self
