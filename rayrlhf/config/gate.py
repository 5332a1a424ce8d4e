"""How engine and learner are compared, and whose log-probs PPO's ratio starts from."""

from typing import Literal

from rayrlhf.config.section import Positive, PositiveFloat, Section

OldLogProbs = Literal["actor", "rollout", "auto"]


class GateConfig(Section):
    """Probes that compare the log-probs of engine and learner on fixed prompts."""

    every: Positive = 50
    """Steps between probes; the first one is before the first step."""
    num_prompts: Positive = 4
    """Prompts of a probe, the longest of the run: each engine answers each of them twice, greedily
    and by sampling."""
    rollout_max: PositiveFloat = 1e-3
    """Largest mean |log-prob of the engine - of the learner| per token, nats, with which
    `old_log_probs: auto` takes the engine's."""
