"""PPO: rollout, losses, KL penalty and pretraining mix."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.asynchrony import AsynchronyConfig
from rayrlhf.config.gate import GateConfig, OldLogProbs
from rayrlhf.config.kl import KLConfig
from rayrlhf.config.rewards import RewardSource, check_rewards
from rayrlhf.config.section import Fraction, NonNegative, Positive, PositiveFloat
from rayrlhf.config.training import RoleLoraConfig, RoleTrainingConfig


class PPOConfig(AsynchronyConfig):
    """PPO with five roles; the defaults are those of InstructGPT appendix C.4 where it has one."""

    prompts: str
    """Prompts to roll out: `prompt` or `messages`."""
    init: str | None = None
    """Policy to go on from: folder, hub name or `builtin:` name. None: the SFT model, which is the
    reference in any case."""
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
    lora: RoleLoraConfig | None = None
    """Train adapters in place of all weights, of the actor and the critic; `{}` takes the defaults.
    What `actor.lora` or `critic.lora` says comes first; for one of the two, set that alone."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps that update the critic only."""
    clip: PositiveFloat = 0.2
    """Range of the policy ratio: 1 - clip to 1 + clip (arXiv:1707.06347, eq. 7)."""
    value_clip: PositiveFloat = 0.2
    """Range of the new values around the old ones."""
    advantage_estimator: Literal["gae", "grpo", "rloo", "reinforce_pp"] = "gae"
    """Who says how much better a token was than expected: a critic (`gae`), the other responses to
    the prompt (`grpo` arXiv:2402.03300, `rloo` arXiv:2402.14740), or the mean of the batch
    (`reinforce_pp` arXiv:2501.03262). All but `gae` run without a critic."""
    gamma: Fraction = 1.0
    """Discount per token, of `gae` and `reinforce_pp`."""
    gae_lambda: Fraction = 0.95
    """arXiv:1506.02438, eq. 16."""
    whiten_advantages: bool | None = None
    """Over the tokens of the whole step; None: with `gae` and `reinforce_pp`, as these do."""
    group_std: bool = True
    """`grpo` divides by the standard deviation of the group; false leaves it out (Dr. GRPO,
    arXiv:2503.20783), so that prompts with nearly equal scores weigh no more than others."""
    loss_mean: Literal["token", "sequence"] = "token"
    """The actor's loss is a mean over tokens, or over responses of their means over tokens (GRPO
    eq. 3), where a token of a long response weighs less."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where the KL penalty is: in the reward of each token (k1), or in the actor's loss (k3, which
    never is negative). None: in the loss for `grpo`, in the reward for the others."""
    rewards: tuple[RewardSource, ...] = ()
    """What the score is the weighted sum of; none: it is the run's own reward model's."""
    reward_clip: PositiveFloat | None = None
    """Scores are clipped to ±this, before the KL penalty is added."""
    missing_eos_penalty: NonNegative = 1.0
    """Subtracted from the score of a response that does not end by itself."""
    kl_coef: NonNegative = 0.02
    """beta of the per-token KL penalty (InstructGPT: 0.02), or the adaptive one's first value. A
    run that is resumed takes the adaptive one from its checkpoint, and a fixed one from here."""
    kl_target: PositiveFloat | None = None
    """Nats per response that an adaptive coefficient steers to (arXiv:1909.08593, section 2.2);
    None keeps the coefficient fixed."""
    kl_horizon: PositiveFloat = 10_000
    """Responses over which the adaptive coefficient may change by its own size."""
    kl: KLConfig = KLConfig()
    """The KL budget: above it the run pauses updates, goes back, or stops."""
    ptx_coef: NonNegative = 0.0
    """gamma of PPO-ptx (InstructGPT eq. 2): weight of the pretraining loss in the actor's."""
    ptx_batch_size: Positive = 8
    """Rows of the corpus per minibatch of PPO-ptx."""
    old_log_probs: OldLogProbs = "actor"
    """Whose log-probs the ratio starts from. `actor`: the first ratio is exactly 1. `rollout`: the
    engine's own, 1 but for rounding (1e-4 in float32), which saves a forward pass where a step has
    several micro-batches. `auto`: the engine's where the gate's probes agree, else the actor's."""
    kl_rollout_mismatch_max: PositiveFloat = 1e-3
    """Largest mean |log-prob of the engine - of the learner| per token, nats; beyond it the run
    stops and says why. float32 gives below 1e-4; bfloat16 needs about 0.1, or `old_log_probs:
    auto`."""
    gate: GateConfig = GateConfig()
    """Probes that compare engine and learner."""
    rollout_memory_gib: PositiveFloat = 0.25
    """KV cache of one engine on CPU, GiB."""
    profile: bool = False
    """Trace the trained roles for a step and measure a few more: ppo/profile/ gets the traces, and
    a table of seconds and FLOP utilisation per role and phase."""
    deadline_s: PositiveFloat = 600
    """Longest wait for one call to a role. Whoever takes longer hangs, and is ended like a worker
    that died. The run stops, and names the role, when a start takes as long, or the successor of a
    rollout, reference or reward worker; learners go back as often as `max_restarts` allows."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Deaths within an hour that the run survives: of each rollout, reference or reward worker,
    whose successor repeats what it was doing, and of the ranks of the actor or of the critic
    together, after which both go back to the newest checkpoint. One that hangs counts for good."""
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

    @property
    def has_critic(self) -> bool:
        """Whether the learner needs a value function."""
        return self.advantage_estimator == "gae"

    def lora_of(self, role: str) -> RoleLoraConfig | None:
        """Return the adapters that `actor` or `critic` trains; None where it trains all weights."""
        own = {"actor": self.actor.lora, "critic": self.critic.lora}[role]
        return self.lora if own is None else own

    @property
    def compares_groups(self) -> bool:
        """Whether the learner compares the responses to one prompt."""
        return self.advantage_estimator in ("grpo", "rloo")

    weight_transfer: Literal["object_store", "broadcast"] = "object_store"
    """How new weights get from the actor to the engines. `object_store`: Ray's, bucket by bucket,
    one copy per node. `broadcast`: past the host's memory, over NCCL between GPUs (vLLM's own
    engine) or gloo between CPUs; a worker that is lost in the middle of it takes actor and engines
    back to the newest checkpoint."""

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        if self.whiten_advantages is None:
            return not self.compares_groups
        return self.whiten_advantages

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is in the actor's loss, and not in the reward."""
        usual = "loss" if self.advantage_estimator == "grpo" else "reward"
        return (self.kl_in or usual) == "loss"

    @model_validator(mode="after")
    def _learner_uses_its_keys(self) -> Self:
        """A key that this learner never reads would be taken for one that acts."""
        name = self.advantage_estimator
        if self.compares_groups and self.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.samples_per_prompt={self.samples_per_prompt}: {name} compares the responses "
                "to one prompt: set it to 2 or more (DeepSeekMath: 64), or take "
                "advantage_estimator=reinforce_pp"
            )
        unread = []
        if not self.has_critic:
            unread += ["critic", "critic_warmup_steps", "value_clip", "gae_lambda"]
        if self.compares_groups:
            unread += ["gamma"]
        if name != "grpo":
            unread += ["group_std"]
        for key in unread:
            default = type(self).model_fields[key].default
            if vars(self)[key] != default:
                raise ValueError(
                    f"ppo.{key} has no effect with ppo.advantage_estimator={name}: take it out, "
                    f"or set advantage_estimator={'grpo' if key == 'group_std' else 'gae'}"
                )
        return self

    @model_validator(mode="after")
    def _rewards_can_score(self) -> Self:
        check_rewards(self.rewards, self.deadline_s)
        return self

    @model_validator(mode="after")
    def _kl_budget_can_be_kept(self) -> Self:
        budget = self.kl.budget
        if budget is not None and self.kl_target is not None and self.kl_target >= budget:
            raise ValueError(
                f"ppo.kl_target={self.kl_target:g} is not below ppo.kl.budget={budget:g}: the "
                "adaptive coefficient would steer the policy out of it; set the target to half "
                "of the budget"
            )
        if self.kl.on_exceed == "rollback" and self.kl_coef == 0:
            raise ValueError(
                "ppo.kl.on_exceed=rollback with ppo.kl_coef=0: a larger coefficient is what makes "
                "the run another one; set ppo.kl_coef=0.02, or on_exceed=pause"
            )
        return self

    @model_validator(mode="after")
    def _stale_log_probs_are_weighed(self) -> Self:
        if self.importance_cap is not None and self.old_log_probs == "rollout":
            raise ValueError(
                f"ppo.importance_cap={self.importance_cap:g} has no effect with "
                "ppo.old_log_probs=rollout, whose old policy is the engine's own: set "
                "ppo.old_log_probs=actor, or leave the cap out"
            )
        if self.max_staleness and self.old_log_probs == "rollout":
            raise ValueError(
                f"ppo.old_log_probs=rollout with ppo.max_staleness={self.max_staleness}: the ratio "
                "would be clipped around weights that are gone: set ppo.old_log_probs=actor"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_broadcast(self) -> Self:
        if self.weight_transfer == "object_store":
            return self
        reason = None
        if self.max_staleness:
            reason = f"ppo.max_staleness={self.max_staleness}: engines get new weights one by one"
        elif self.lora is not None or self.actor.lora is not None:
            reason = "adapters, of which only what they change is sent"
        if reason is not None:
            raise ValueError(
                f"ppo.weight_transfer=broadcast does not go with {reason}: set "
                "weight_transfer=object_store"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> Self:
        if self.num_responses % self.num_minibatches:
            raise ValueError(
                f"ppo.batch_size * ppo.samples_per_prompt = {self.num_responses} responses do not "
                f"divide into ppo.num_minibatches={self.num_minibatches}: no response may be "
                "dropped; change one of the three"
            )
        return self
