"""How far the policy may go from the reference, and what happens beyond."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Positive, PositiveFloat, Section


class KLConfig(Section):
    """The KL budget: a reward model is trusted near the policy that its responses came from.

    Beyond some KL the score still rises while what it stands for falls (arXiv:2210.10760).
    """

    budget: PositiveFloat | None = None
    """Nats per response (`kl/ref_per_response`) above which a step does not update the actor. The
    critic and the adaptive coefficient go on. None: no budget."""
    patience: Positive = 3
    """Steps in a row above the budget at the last of which `on_exceed` is done: the KL is a mean
    over the step's responses, and one of them can be above the budget by chance."""
    on_exceed: Literal["pause", "rollback", "stop"] = "pause"
    """`pause`: the actor does not learn from the reward until a step is within the budget. It
    would never be while nothing moves it, so from here on the KL alone is its loss, which pulls it
    back (CRPO, arXiv:2011.05869). `rollback`: actor and critic go back to the newest checkpoint
    that was found within the budget, with the KL coefficient times `coef_factor`. `stop`: the run
    ends."""
    coef_factor: Annotated[float, Field(gt=1)] = 2.0
    """What a rollback multiplies the KL coefficient by; with the old one the same would follow. A
    policy that leaves the budget within a few steps, before there is a KL to penalise, needs a
    lower learning rate instead."""
    max_rollbacks: Positive = 5
    """Rollbacks after which the run ends instead of going back once more."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        """A key that nothing reads would be taken for one that acts."""
        unread = {
            "patience": self.budget is None,
            "on_exceed": self.budget is None,
            "coef_factor": self.budget is None or self.on_exceed != "rollback",
            "max_rollbacks": self.budget is None or self.on_exceed != "rollback",
        }
        for key, is_unread in unread.items():
            value = vars(self)[key]
            if is_unread and value != type(self).model_fields[key].default:
                fix = "budget" if self.budget is None else "on_exceed=rollback"
                raise ValueError(
                    f"ppo.kl.{key}={value} has no effect: set ppo.kl.{fix}, or take it out"
                )
        return self
