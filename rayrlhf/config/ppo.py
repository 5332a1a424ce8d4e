"""PPO: rollout, losses, KL penalty and pretraining mix."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section
from rayrlhf.config.training import RoleTrainingConfig


class PPOConfig(Section):
    """PPO with five roles; the defaults are those of InstructGPT appendix C.4 where it has one."""

    prompts: str
    """Prompts to roll out: `prompt` or `messages`."""
    steps: Positive = 100
    """PPO steps: each rolls out, evaluates, updates and syncs once."""
    batch_size: Positive = 64
    """Prompts per step."""
    samples_per_prompt: Positive = 1
    """G: responses per prompt."""
    max_response_tokens: Positive = 32
    """T: longest response; a response without end-of-text at T is truncated."""
    temperature: PositiveFloat = 1.0
    """Of the rollout, and applied to the learner's log-probs alike."""
    epochs: Positive = 1
    """Passes over each step's responses (InstructGPT: 1)."""
    num_minibatches: Positive = 8
    """Optimizer steps per pass (InstructGPT: 8)."""
    actor: RoleTrainingConfig = RoleTrainingConfig()
    """Optimizer and backend of the policy."""
    critic: RoleTrainingConfig = RoleTrainingConfig()
    """Optimizer and backend of the value function."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps that update the critic only."""
    clip: PositiveFloat = 0.2
    """Range of the policy ratio: 1 - clip to 1 + clip (arXiv:1707.06347, eq. 7)."""
    value_clip: PositiveFloat = 0.2
    """Range of the new values around the old ones."""
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    """arXiv:1506.02438, eq. 16."""
    whiten_advantages: bool = True
    reward_clip: PositiveFloat | None = None
    """Scores are clipped to ±this, before the KL penalty is added."""
    missing_eos_penalty: NonNegative = 1.0
    """Subtracted from the score of a response that does not end by itself."""
    kl_coef: NonNegative = 0.02
    """beta of the per-token KL penalty (InstructGPT: 0.02), or the adaptive one's first value."""
    kl_target: PositiveFloat | None = None
    """Nats per response that an adaptive coefficient steers to (arXiv:1909.08593, section 2.2);
    None keeps the coefficient fixed."""
    kl_horizon: PositiveFloat = 10_000
    """Responses over which the adaptive coefficient may change by its own size."""
    ptx_coef: NonNegative = 0.0
    """gamma of PPO-ptx (InstructGPT eq. 2): weight of the pretraining loss in the actor's."""
    ptx_batch_size: Positive = 8
    """Rows of the corpus per minibatch of PPO-ptx."""
    kl_rollout_mismatch_max: PositiveFloat = 1e-3
    """Largest mean |log-prob of the engine - of the learner| per token, nats; beyond it the run
    stops. float32 gives below 1e-4; bfloat16 needs about 0.1."""
    rollout_memory_gib: PositiveFloat = 0.25
    """KV cache of one engine on CPU, GiB."""
    deadline_s: PositiveFloat = 600
    """Longest wait for one call to a role before the run stops and names the role."""
    sample_every: Positive = 10
    """Steps between samples on the terminal and in samples.jsonl."""
    save_every: Positive = 10
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2

    @property
    def num_responses(self) -> int:
        """B: responses per step."""
        return self.batch_size * self.samples_per_prompt

    @property
    def minibatch_size(self) -> int:
        """Responses that one optimizer step sees."""
        return self.num_responses // self.num_minibatches

    @model_validator(mode="after")
    def _minibatches_divide(self) -> Self:
        if self.num_responses % self.num_minibatches:
            raise ValueError(
                f"ppo.batch_size * ppo.samples_per_prompt = {self.num_responses} responses do not "
                f"divide into ppo.num_minibatches={self.num_minibatches}: no response may be "
                "dropped; change one of the three"
            )
        return self
