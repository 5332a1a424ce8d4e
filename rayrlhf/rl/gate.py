"""Whether the engines sample from what the learner trains, and whose old log-probs to take.

A probe lets every engine answer a few fixed prompts, greedily and by sampling, and compares the
log-probs that it reports with the learner's. It is made at start, every `ppo.gate.every` steps, and
when the responses of a step differ by too much. Beyond `ppo.kl_rollout_mismatch_max` the run stops,
after experiments that find out which of these is wrong:

    temperature    the gap is that of sampled answers, and gone at another temperature
    top-p          the gap is that of sampled answers, and the engine's tokens are all the likelier:
                   it leaves out part of the distribution (top-p, top-k, min-p)
    prefix cache   keys and values of old weights: the gap is gone when the cache is
    weights        an engine has others than the learner: the gap is gone when they are sent again
    dtype          none of these, and no more than rounding does: engine and learner round
                   differently

A gap is gone when it is within the bound, or a fraction of what it was: in bfloat16 some is left.

Old log-probs are the learner's with `ppo.old_log_probs: actor`, whose first ratio is exactly 1.
With `rollout` they are the engine's, which saves a forward pass where a step has several
micro-batches; the first ratio is then 1 but for rounding. `auto` takes the engine's while the
probes agree to `ppo.gate.rollout_max`, and the learner's otherwise, also where a wrong dtype would
have ended the run, or where the responses of a step differ by no more than rounding does and the
probes find nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rayrlhf import console
from rayrlhf.config import PPOConfig
from rayrlhf.data.encoded import token_counts
from rayrlhf.rl.experience import Rollout
from rayrlhf.rl.off_policy import fresh_part
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.supervision import Ref
from rayrlhf.rl.waiting import Pending, known, share
from rayrlhf.rl.weight_sync import sync_weights

ROUNDING_MAX = 0.2
"""Nats per token: more is no rounding. bfloat16 against float32 gives 0.01 to 0.1."""
FRACTION = 4.0
"""How much smaller a gap is that counts as gone, or as another one's."""
TEMPERATURES = [2 ** (exponent / 8) for exponent in range(-24, 17)]
"""1/8 to 4, tried beside 1 when the engine seems to sample at another temperature."""
Evaluated = tuple[Tensor, dict[str, float]]
"""Old log-probs (N,), and what is known of entropy and mismatch before the update."""


@dataclass(frozen=True)
class Probe:
    """Log-probs of the probe's tokens, flat, nats."""

    engine: Tensor
    learner: Tensor

    @property
    def gap(self) -> float:
        """Mean |log-prob of the engine - of the learner| per token."""
        return float((self.engine - self.learner).abs().mean())


class Gate:
    """Compares the engines with the learner at start and every `ppo.gate.every` steps."""

    def __init__(
        self,
        cfg: PPOConfig,
        roles: Roles,
        prompts: Prompts,
        *,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """`settle` lets the engines have the learner's weights, and nothing else to do."""
        self.cfg, self.roles, self._settle = cfg, roles, settle
        lengths = token_counts(prompts.ids)
        longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        self.prompts = [prompts.ids[index] for index in longest[: cfg.gate.num_prompts]]
        self.takes_rollout = cfg.old_log_probs == "rollout"
        self._bound = cfg.kl_rollout_mismatch_max
        self._probed = False

    def is_due(self, step: int) -> bool:
        """Tell whether `probe` has something to do."""
        return not self._probed or step % self.cfg.gate.every == 0

    def probe(self, step: int, version: int) -> dict[str, float]:
        """Probe when it is due, while the learner has the weights `version`; returns metrics.

        A run that resumes probes, too, and says so only where an uninterrupted one would. Raises
        RuntimeError, with what is wrong, beyond `ppo.kl_rollout_mismatch_max`.
        """
        if not self.is_due(step):
            return {}
        self._probed = True
        greedy, sampled = self._compare(version)
        is_said = step % self.cfg.gate.every == 0
        return {"gate/greedy": greedy.gap, "gate/sampled": sampled.gap} if is_said else {}

    def old_log_probs(
        self, rollout: Rollout, shared: Ref, step: int, version: int
    ) -> Pending[Evaluated]:
        """Start to evaluate log pi_old (N,) of a rollout; `version` is that of the learner.

        The engine's are taken, and compared with, where both have the same weights.
        """
        if self.takes_rollout and bool((rollout.weight_versions == version).all()):
            return known((rollout.log_probs, {}))
        pending: Pending[Any] = self.roles.actor.log_probs(shared, step)

        def gather(parts: list[Any]) -> Evaluated:
            log_probs, entropy = pending.gather(parts)
            metrics = {"policy/entropy": entropy}
            learners, engines = fresh_part(log_probs, rollout, version)
            if len(learners):
                metrics["kl/rollout_mismatch"] = float((learners - engines).abs().mean())
            return log_probs, metrics

        return replace(pending, gather=gather)

    def watch(self, metrics: dict[str, float], version: int) -> dict[str, float]:
        """Return metrics of a step; `version` is the learner's now.

        Raises RuntimeError, with what is wrong, for a mean |log-prob of the engine - of the
        learner| beyond `ppo.kl_rollout_mismatch_max`; where a probe found that rounding is why,
        beyond what rounding does. After the update: the actor holds graphs before.
        """
        if "kl/rollout_mismatch" in metrics:
            self._allow(metrics["kl/rollout_mismatch"], version)
        return metrics

    def _allow(self, mismatch: float, version: int) -> None:
        if mismatch <= self._bound:
            return
        worst = worst_of(*self._compare(version))
        if mismatch <= self._bound:  # now: rounding is why
            return
        if self.cfg.old_log_probs != "auto" or not mismatch <= ROUNDING_MAX:
            raise RuntimeError(
                f"{too_large(mismatch, self._bound)}. Probes differ by {worst:.3g} only: see the "
                "log of the engines for what was different in this step"
            )
        self._compute_around(mismatch, f"in a step's responses, {worst:.3g} in probes")

    def _compare(self, version: int) -> tuple[Probe, Probe]:
        """Probe, greedily and by sampling; raises as `probe`."""
        self._settle()
        greedy, sampled = self._measure(0.0), self._measure(self.cfg.temperature)
        worst = worst_of(greedy, sampled)
        if worst > self.cfg.kl_rollout_mismatch_max:
            self._judge(greedy, sampled, version)
        if self.cfg.old_log_probs == "auto":
            self.takes_rollout = worst <= self.cfg.gate.rollout_max and not self._rounds
        return greedy, sampled

    @property
    def _rounds(self) -> bool:
        """Whether engine and learner were found to round differently."""
        return self._bound > self.cfg.kl_rollout_mismatch_max

    def _compute_around(self, mismatch: float, what: str) -> None:
        """Take the actor's log-probs from now on, and allow what rounding gives."""
        self._bound = max(self.cfg.kl_rollout_mismatch_max, ROUNDING_MAX)
        self.takes_rollout = False
        console.say(
            f"ppo: engine and actor differ by {mismatch:.3g} nats per token ({what}): old "
            "log-probs are the actor's (ppo.old_log_probs=auto)"
        )

    def _measure(self, temperature: float) -> Probe:
        """Let every engine answer the prompts, and the learner say how likely that was."""
        rollout = self.roles.rollout.probe(self.prompts, temperature).wait()
        return Probe(rollout.log_probs, self._learner(rollout, temperature or 1.0))

    def _learner(self, rollout: Rollout, temperature: float) -> Tensor:
        return self.roles.actor.probe(share(rollout), temperature).wait()

    def _judge(self, greedy: Probe, sampled: Probe, version: int) -> None:
        """Stop the run with the reason, or go on where `auto` computes around it."""
        what, fix = self._cause(greedy, sampled, version)
        worst = worst_of(greedy, sampled)
        if what.startswith("dtype") and worst > ROUNDING_MAX:
            what = f"none of what they know, and rounding gives less than {ROUNDING_MAX:g}"
            fix = "see the log of the engines"
        if not what.startswith("dtype") or self.cfg.old_log_probs != "auto":
            raise RuntimeError(f"{too_large(worst, self._bound)}. Probes say {what}: {fix}")
        if not self._rounds:
            self._compute_around(worst, what)

    def _cause(self, greedy: Probe, sampled: Probe, version: int) -> tuple[str, str]:
        """Find out what is wrong, by what makes it right; returns that and what to do."""
        bound = self.cfg.kl_rollout_mismatch_max
        of_sampling = greedy.gap <= bound or sampled.gap > FRACTION * greedy.gap
        rounding = max(bound, FRACTION * greedy.gap)
        if of_sampling and (cause := self._cause_of_sampling(sampled, rounding)):
            return cause
        if not greedy.gap <= bound:
            gone = max(bound, greedy.gap / FRACTION)
            self.roles.rollout.reset_prefix_cache().wait()
            if self._measure(0.0).gap <= gone:
                return "a stale prefix cache", "it must be reset when weights are loaded"
            sync_weights(self.roles.actor, self.roles.rollout, version=version)
            if self._measure(0.0).gap <= gone:
                return "weights of another version in an engine", "see the log of the engines"
        engine, learner = self.roles.rollout.dtype(), self.cfg.actor.precision
        return (
            f"dtype: the engines compute in {engine}, the actor in {learner}",
            "set ppo.actor.precision=float32, or with bfloat16 ppo.old_log_probs=auto or "
            "ppo.kl_rollout_mismatch_max=0.1",
        )

    def _cause_of_sampling(self, sampled: Probe, rounding: float) -> tuple[str, str] | None:
        wanted = self.cfg.temperature
        rollout = self.roles.rollout.probe(self.prompts, wanted).wait()
        gaps = {
            temperature: Probe(rollout.log_probs, self._learner(rollout, temperature)).gap
            for temperature in TEMPERATURES
        }
        best = min(gaps, key=lambda temperature: gaps[temperature])
        if gaps[best] < sampled.gap / FRACTION and abs(best / wanted - 1) > 1e-3:
            return (
                f"temperature: the engine's log-probs are those of {best:.2g}, not of {wanted:g}",
                "it must sample at ppo.temperature and report log-probs after it",
            )
        kept = sampled.learner - sampled.engine  # log of what the engine kept, at each token
        mean, spread = float(kept.mean()), float(kept.std()) / math.sqrt(len(kept))
        is_one_sided = FRACTION * float(kept.clamp(min=0).mean()) <= -mean
        if is_one_sided and mean < -max(rounding, 3 * spread):
            return (
                f"top-p, top-k or min-p: the engine keeps {math.exp(float(kept.mean())):.0%} of "
                "the distribution",
                "it must sample from all of it",
            )
        return None


def worst_of(*probes: Probe) -> float:
    """Return the largest gap; infinity for one that is no number."""
    return max(math.inf if math.isnan(probe.gap) else probe.gap for probe in probes)


def too_large(mismatch: float, bound: float) -> str:
    """Return what is to say of a mismatch beyond its bound."""
    what = "what rounding gives, " if bound == ROUNDING_MAX else "ppo.kl_rollout_mismatch_max="
    return (
        f"kl/rollout_mismatch={mismatch:.3g} nats per token is beyond {what}{bound:g}: the engine "
        "samples from another distribution than the actor learns on"
    )
