"""The KL budget: what a step does whose policy is further from the reference than it may be.

    KL of the step   steps in a row     the actor
    within           -                  learns from the reward
    above            below patience     waits: one step's KL is an estimate
    above            from patience on   pause: learns from the KL alone (k3, GRPO eq. 4), so that it
                                        comes back whatever kl_coef is; the score has no say
                                        rollback: goes back, with a larger coefficient
                                        stop: the run ends

The critic learns from every step that is finished, and the KL controller takes in its KL. `pause`
is CRPO (arXiv:2011.05869): improve the constraint while it is violated, the reward while it holds.
With PPO-ptx, that gradient stays in the actor's.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayrlhf import console
from rayrlhf.config import PPOConfig
from rayrlhf.rl.credit import Credit
from rayrlhf.rl.supervision import GoBack

PULL_COEF = 1.0
"""Of the KL when it is the whole loss; AdamW's step does not depend on it."""


@dataclass(frozen=True)
class Rollback:
    """The last rollback of a run."""

    step: int
    """Of the checkpoint that it went back to; 0: the start models."""
    number: int
    """Which one it is, from 1."""
    kl_coef: float
    """Coefficient that the run goes on with."""
    count: int
    """Steps above the budget until then."""


class OverBudget(GoBack):
    """The policy was above the KL budget for too long."""

    def __init__(self, rollback: Rollback) -> None:
        super().__init__(f"KL rollback {rollback.number} to step {rollback.step}")
        self.rollback = rollback


@dataclass
class KLBudget:
    """Watches the KL of every step; all but `cfg` is in the checkpoint."""

    cfg: PPOConfig
    in_a_row: int = 0
    """Steps above the budget, up to now."""
    count: int = 0
    """Steps above the budget in the whole run."""
    rollbacks: int = 0
    good_step: int = 0
    """Of the newest checkpoint whose policy was found within the budget; 0: the start models."""

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {name: value for name, value in vars(self).items() if name != "cfg"}

    def keep(self, credit: Credit, ref_log_probs: Tensor, step: int, kl_coef: float) -> Credit:
        """Return what `step` learns from, whose rollout has the KL of `credit`.

        Raises OverBudget when the run has to go back, and RuntimeError when it has to end.
        """
        cfg, kl = self.cfg.kl, credit.kl_per_response
        if cfg.budget is None:
            return credit
        is_over = not kl <= cfg.budget  # NaN is above it
        if is_over:
            self.in_a_row, self.count = self.in_a_row + 1, self.count + 1
            credit = self._constrain(credit, ref_log_probs, step, kl_coef)
        else:
            was_over, self.in_a_row = self.in_a_row > 0, 0
            if was_over:
                self._say(step, kl, "the actor learns from the reward again")
            if step % self.cfg.save_every == 0:
                self.good_step = step
        found = {
            "kl/over_budget": float(is_over),
            "kl/over_budget_count": float(self.count),
            "kl/rollbacks": float(self.rollbacks),
        }
        return replace(credit, metrics=credit.metrics | found)

    def _constrain(
        self, credit: Credit, ref_log_probs: Tensor, step: int, kl_coef: float
    ) -> Credit:
        """Return what a step above the budget learns from; raises as `keep` does."""
        cfg, kl = self.cfg.kl, credit.kl_per_response
        if self.in_a_row < cfg.patience:
            then = {
                "pause": "the KL alone pulls it back",
                "rollback": "it goes back to a checkpoint",
                "stop": "the run ends",
            }[cfg.on_exceed]
            self._say(step, kl, f"it does not update the actor; after {cfg.patience} {then}")
            return replace(credit, updates_actor=False)
        if cfg.on_exceed == "stop":
            raise RuntimeError(
                f"{self._text(step, kl)} (ppo.kl.on_exceed=stop): the policy is further from the "
                "reference than the reward model may be trusted. The checkpoints are whole: take "
                "an earlier one, or run the same command with a larger ppo.kl.budget, or with "
                "ppo.kl.on_exceed=rollback"
            )
        if cfg.on_exceed == "rollback":
            raise self._rollback(step, kl, kl_coef)
        if self.in_a_row == cfg.patience:
            self._say(step, kl, "the actor learns from the KL alone until it is within it")
        experience = replace(
            credit.experience,
            advantages=torch.zeros_like(credit.experience.advantages),
            ref_log_probs=ref_log_probs,
            kl_coef=PULL_COEF,
        )
        return replace(credit, experience=experience)

    def _rollback(self, step: int, kl: float, kl_coef: float) -> OverBudget:
        """Return where to go back to; raises RuntimeError when it has been done too often."""
        cfg = self.cfg.kl
        if self.rollbacks == cfg.max_rollbacks:
            raise RuntimeError(
                f"{self._text(step, kl)}, after {self.rollbacks} rollbacks: "
                f"ppo.kl.max_rollbacks={cfg.max_rollbacks} allows no more. ppo.kl_coef="
                f"{kl_coef:g} does not hold the policy: lower ppo.actor.learning_rate, or set a "
                "larger ppo.kl.budget"
            )
        coef = kl_coef * cfg.coef_factor
        self._say(step, kl, f"the run goes back, and on with a KL coefficient of {coef:g}")
        return OverBudget(Rollback(self.good_step, self.rollbacks + 1, coef, self.count))

    def _text(self, step: int, kl: float) -> str:
        """Return what the step was found at; `step` counts from 0, what people read from 1."""
        found = f"step {step + 1}: KL {kl:.4g} nats per response"
        if not self.in_a_row:
            return f"{found}, within ppo.kl.budget={self.cfg.kl.budget:g}"
        return f"{found}, above ppo.kl.budget={self.cfg.kl.budget:g} for {self.in_a_row} in a row"

    def _say(self, step: int, kl: float, then: str) -> None:
        console.say(f"ppo: {self._text(step, kl)}: {then}")
