"""Optimizer, schedule and backend of every trained model; the stages that Ray Train runs."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section

WARMUP_KEYS = ("warmup_steps", "warmup_tokens")
"""What takes the place of `warmup_ratio`."""


class TrainingConfig(Section):
    """What every trained model has: optimizer, schedule and backend."""

    tokens_per_microbatch: Positive = 4096
    """Padded tokens that one forward pass of one worker holds; bounds memory, not the result."""
    learning_rate: PositiveFloat = 9e-6
    """Peak learning rate (InstructGPT appendix C: 9e-6 for the reward model and for PPO)."""
    min_learning_rate_ratio: Fraction = 0.1
    """Final over peak learning rate of the cosine (GPT-3, arXiv:2005.14165: 0.1)."""
    warmup_ratio: Fraction = 0.0
    """Part of the steps with a linear warm-up; with `warmup_steps`, 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Instead of a ratio: the warm-up's optimizer steps (LLaMA, arXiv:2302.13971: 2,000)."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    """0.95 in GPT-3, LLaMA and InstructGPT."""
    adam_eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.0
    """Decoupled decay (AdamW) of matrices; norms, biases and embeddings have none."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm (GPT-3: 1.0)."""
    backend: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """`ddp` holds everything on every rank; `fsdp` (PyTorch's FSDP2) and `deepspeed` shard it.
    Checkpoints fit all of them, and any number of ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; only with backend=deepspeed."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer, and the weights that are in shards, are kept: `cpu` with ZeRO (stage 1
    on) or FSDP, `nvme` with ZeRO stage 3 (ZeRO-Infinity, arXiv:2104.07857)."""
    offload_dir: str | None = None
    """Folder on the NVMe disk of every node; only with offload=nvme."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of forward and backward; master weights and optimizer stay in float32. `auto` takes bfloat16
    on devices that have instructions for it."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers and compute the rest again in the backward pass: less
    memory, a third more work. The result is the same."""
    compile: bool = False
    """Run the layers through torch.compile, under every backend but ZeRO stage 3; needs g++ on the
    workers' nodes. For 135M parameters in float32 it takes 8% less CPU time per step, and 11 s of
    it to compile, once per variant."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Kernel for rows whose documents do not see each other: `sdpa` computes all of a row and masks
    it; `flex` (torch.nn.attention.flex_attention, compiled; trains on GPUs only) leaves out blocks
    of 128 x 128 without a pair. `auto` takes flex on GPUs for rows of 1,024 tokens and more. Other
    rows take sdpa without a mask, always."""

    @model_validator(mode="after")
    def _zero3_does_not_compile(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile=true does not go with zero_stage=3, which gathers weights inside the "
                "layers: set compile=false, or a lower zero_stage"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _warm_up_in_one_unit(cls, tree: Any) -> Any:
        given = [key for key in WARMUP_KEYS if isinstance(tree, dict) and tree.get(key) is not None]
        if given and tree.get("warmup_ratio"):
            given.insert(0, "warmup_ratio")
        if len(given) > 1:
            said = " and ".join(f"{key}={tree[key]}" for key in given)
            raise ValueError(
                f"{said} both say how long the warm-up is: keep one, take out the rest"
            )
        return {"warmup_ratio": 0.0, **tree} if given else tree

    @model_validator(mode="after")
    def _fits_the_backend(self) -> Self:
        if self.zero_stage and self.backend != "deepspeed":
            raise ValueError(
                f"zero_stage={self.zero_stage} needs backend=deepspeed, not {self.backend}: "
                "set backend=deepspeed or zero_stage=0"
            )
        if self.offload == "cpu" and self.backend != "fsdp" and not self.zero_stage:
            raise ValueError(
                "offload=cpu needs shards of the optimizer: set backend=fsdp, or "
                "backend=deepspeed zero_stage=1 or more"
            )
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError(
                "offload=nvme needs backend=deepspeed zero_stage=3: set these, or offload=cpu"
            )
        if (self.offload == "nvme") != (self.offload_dir is not None):
            raise ValueError(
                f"offload={self.offload} with offload_dir={self.offload_dir}: set offload_dir to "
                "a folder on the NVMe disk with offload=nvme, and not without"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685) beside frozen weights; the defaults are QLoRA's."""

    rank: Positive = 64
    """Of the two matrices A and B of an adapter (QLoRA, arXiv:2305.14314, appendix B.2)."""
    alpha: PositiveFloat = 16
    """B A is scaled by alpha / rank (QLoRA, appendix B.2)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of what goes into A (QLoRA, appendix B.2: 0.1 up to 13B, 0.05 beyond)."""
    target_modules: tuple[str, ...] | None = None
    """Names of linear modules, such as q_proj; None takes all those of the layers (QLoRA)."""


class EarlyStopping(Section):
    """Stop on held-out data; the best checkpoint becomes `final`."""

    patience: Positive = 3
    """Evaluations in a row without a better value than the best one, after which training ends."""


class StageConfig(TrainingConfig):
    """A Ray Train stage: a training run with epochs, logging and checkpoints."""

    batch_size: Positive
    """Sequences (`reward` and `dpo`: prompts) that one optimizer step sees, over all workers."""
    init: str | None = None
    """Model to start from (folder); None takes the stage before it in the recipe."""
    epochs: PositiveFloat = 1
    """Passes over the training data."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the residual stream."""
    log_every: Positive = 10
    """Steps between lines on the terminal; metrics.jsonl gets every step."""
    eval_every: Positive | None = None
    """Steps between evaluations on held-out data; None evaluates at the end only."""
    save_every: Positive = 100
    """Steps between checkpoints; a killed run loses at most this many steps of time."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep; `final/` is always kept, and the best while training may go back
    to it."""
    early_stopping: EarlyStopping | None = None
    """Stop when the metric on held-out data gets no better; None trains to the end."""
    lora: LoraConfig | None = None
    """Train adapters only, and the scalar head of a reward model; `{}` takes the defaults. They
    take a larger learning rate (QLoRA: 2e-4 up to 13B, 1e-4 beyond)."""
    quantization: Literal["none", "nf4"] = "none"
    """Of the frozen weights under `lora`: nf4 holds a weight in 4 bits (QLoRA)."""

    @property
    def _asks_for_early_stopping(self) -> bool:
        """Whether more than the default is asked for, which only acts where it can."""
        default = type(self).model_fields["early_stopping"].default
        return self.early_stopping not in (None, default)

    @model_validator(mode="after")
    def _early_stopping_measures(self) -> Self:
        if self._asks_for_early_stopping and self.eval_every is None:
            raise ValueError(
                "early_stopping compares evaluations, but eval_every is empty: set eval_every, "
                "for example to a tenth of the steps, or take early_stopping out"
            )
        return self

    @model_validator(mode="after")
    def _only_frozen_weights_are_quantized(self) -> Self:
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization={self.quantization} holds frozen weights, and without lora there "
                "are none: add `lora: {}`, or set quantization=none"
            )
        if self.quantization != "none" and self.backend != "ddp":
            raise ValueError(
                f"quantization={self.quantization} needs backend=ddp, not {self.backend}, which "
                "would cut or cast the packed weights: set backend=ddp, or quantization=none"
            )
        return self


class LossSpikeConfig(Section):
    """Leave out the update of a step whose loss or gradient norm is far above the recent ones.

    The rule and its defaults are those of OLMo 2 32B's optimizer (OLMo-core, SkipStepAdamW); PaLM
    (arXiv:2204.02311, section 5.1) went back and left out 200 to 500 batches by hand.
    """

    window: Annotated[int, Field(ge=4)] = 128
    """Newest updates whose mean and standard deviation say what is usual; before half of them are
    there, nothing is left out."""
    threshold: PositiveFloat = 6.0
    """Standard deviations above the mean from which on a value is a spike."""
    max_consecutive: Positive = 10
    """So many skipped steps in a row are no spike: one more ends the run. A choice of this project:
    PaLM saw that the same batches are harmless to other weights, so skips come singly."""


class PretrainConfig(StageConfig):
    """Next-token prediction on the packed corpus."""

    corpus: str | None = None
    """Folder of a finished corpus, local or a URI that is streamed; None: that of this run."""
    documents: Literal["joined", "apart"] = "joined"
    """Whether attention and positions run on over the documents of a row (GPT-3), or begin anew at
    each of them (Llama 3, arXiv:2407.21783, section 3.2)."""
    batch_size: Positive = 32
    learning_rate: PositiveFloat = 6e-4
    """GPT-3 small (arXiv:2005.14165, table 2.1)."""
    warmup_ratio: Fraction = 0.02
    warmup_tokens: Positive | None = None
    """Instead of a ratio or steps: tokens over which the warm-up is linear (GPT-3: 375 million)."""
    decay_tokens: Positive | None = None
    """Tokens, the warm-up's included, at which the cosine ends; the rate stays at its minimum from
    then on (GPT-3: 260 of 300 billion). None: at the last step."""
    batch_size_start: Positive | None = None
    """Sequences of the first step; from there the batch grows to `batch_size` over
    `batch_ramp_tokens`, linearly in the tokens seen (GPT-3: from 32k tokens)."""
    batch_ramp_tokens: Positive | None = None
    """Tokens over which the batch grows (GPT-3: the first 4 to 12 billion, by size of model)."""
    weight_decay: NonNegative = 0.1
    """GPT-3 and LLaMA."""
    loss_spike: LossSpikeConfig | None = None
    """Skip spikes; None updates at every step whose gradient is finite. `{}` takes the defaults."""
    num_samples: Annotated[int, Field(ge=0)] = 5
    """How many times generated samples are printed while training: after the first step, after the
    last, and between them evenly on a logarithmic scale."""
    sample_prompts: tuple[str, ...] = ("The movie",)
    """Openings that the printed samples continue."""

    @model_validator(mode="after")
    def _trains_all_weights(self) -> Self:
        if self.lora is not None:
            raise ValueError(
                "pretrain.lora: pretraining has no frozen weights: take lora out, or give it to "
                "sft, reward or dpo"
            )
        return self

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        if (self.batch_size_start is None) != (self.batch_ramp_tokens is None):
            raise ValueError(
                f"pretrain.batch_size_start={self.batch_size_start} and "
                f"pretrain.batch_ramp_tokens={self.batch_ramp_tokens}: a ramp needs both: set "
                "both, or neither"
            )
        if self.batch_size_start is not None and self.batch_size_start > self.batch_size:
            raise ValueError(
                f"pretrain.batch_size_start={self.batch_size_start} is larger than "
                f"pretrain.batch_size={self.batch_size}, but batches grow: lower the start"
            )
        if self.decay_tokens is not None and self.decay_tokens <= (self.warmup_tokens or 0):
            raise ValueError(
                f"pretrain.decay_tokens={self.decay_tokens} is not beyond "
                f"pretrain.warmup_tokens={self.warmup_tokens}, which it includes: raise it"
            )
        return self


class RecordsConfig(StageConfig):
    """A stage that trains on records, and may be measured on others."""

    validation: str | None = None
    """Held-out records of the same kind."""

    @model_validator(mode="after")
    def _early_stopping_has_data(self) -> Self:
        if self._asks_for_early_stopping and self.validation is None:
            raise ValueError(
                "early_stopping compares values on held-out data, but validation is empty: set it, "
                "or take early_stopping out"
            )
        return self


class SFTConfig(RecordsConfig):
    """Supervised fine-tuning on demonstrations; loss on the response only."""

    train: str
    """Demonstrations: `prompt` + `response`, or `messages`."""
    batch_size: Positive = 32
    """InstructGPT appendix C.1 (1.3B and 6B)."""
    learning_rate: PositiveFloat = 9.65e-6
    """InstructGPT appendix C.1 (1.3B and 6B)."""
    epochs: PositiveFloat = 16
    """InstructGPT section 3.5."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Residual dropout, InstructGPT section 3.5."""
    neftune_alpha: NonNegative = 0.0
    """Noise on the embeddings in training (NEFTune, arXiv:2310.05914: 5, 10 or 15); 0 is none."""


class RoleLoraConfig(LoraConfig):
    """Adapters of PPO's actor or critic."""

    dropout: NonNegative = 0.0
    """None: the ratio of a policy to itself would not be 1."""

    @model_validator(mode="after")
    def _drops_nothing(self) -> Self:
        if self.dropout > 0:
            raise ValueError(
                f"lora.dropout={self.dropout:g}: PPO compares log-probs from before and after an "
                "update, so no role drops anything: set dropout=0, or take it out"
            )
        return self


class RoleTrainingConfig(TrainingConfig):
    """Training of PPO's actor or critic."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """The same in all processes that hold the model: no `auto`."""
    lora: RoleLoraConfig | None = None
    """Train adapters only, and the critic's scalar head; None takes `ppo.lora`. They take a larger
    learning rate (QLoRA: 2e-4 up to 13B, 1e-4 beyond)."""
