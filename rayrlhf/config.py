"""The recipe: one YAML file, typed, frozen, checked before anything starts.

`load(path, overrides)` reads a recipe and applies `key.sub=value` overrides. Every error is a
`RecipeError`, whose text names the value, the rule and the fix; the command line turns it into
exit code 2. This module imports neither torch nor ray, so that `rayrlhf --help` stays fast.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Role = Literal["actor", "critic", "reference", "reward", "rollout"]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
TRAINED_STAGES = ("pretrain", "sft", "reward")
# Attention of vLLM 0.32 on CPU has kernels for these sizes of a head only; GPUs have them all.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
STAGES = ("corpus", "pretrain", "sft", "reward", "ppo", "evaluate")

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RecipeError(ValueError):
    """The recipe or the data is wrong: the person at the keyboard can fix it (exit code 2)."""


class Section(BaseModel):
    """A part of the recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class RoleResources(Section):
    """What one PPO role gets."""

    num_workers: Positive = 1
    """Ray actors of the role: data-parallel ranks, or engines for `rollout`."""
    cpus: NonNegative = 0.25
    """Logical CPUs per worker; below 1 because the roles take turns."""
    gpus: NonNegative = 0
    """GPUs per worker; above 1 only for `rollout` (tensor parallelism)."""
    num_threads: Positive = 1
    """Threads of torch in each worker."""


class ResourcesConfig(Section):
    """Workers, devices and waiting time."""

    num_workers: Positive = 1
    """Ray Train workers of `pretrain`, `sft` and `reward` (data-parallel ranks)."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs of each Ray Train worker."""
    gpus_per_worker: NonNegative = 0
    """GPUs of each Ray Train worker, at most 1: more ranks use more GPUs."""
    num_threads: Positive = 1
    """Threads of torch in each Ray Train worker."""
    actor: RoleResources = RoleResources()
    critic: RoleResources = RoleResources()
    reference: RoleResources = RoleResources()
    reward: RoleResources = RoleResources()
    rollout: RoleResources = RoleResources()
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement group that holds the PPO roles."""
    wait_s: NonNegative = 0
    """Seconds to wait for an autoscaler to bring what is missing; 0 fails at once."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often Ray Train restarts its workers from the newest checkpoint after one died."""

    @model_validator(mode="after")
    def _workers_can_be_placed(self) -> Self:
        for role in ROLES:
            own = self.role(role)
            if own.cpus == 0:
                raise ValueError(
                    f"resources.{role}.cpus=0: Ray places a worker only where it holds something: "
                    f"set resources.{role}.cpus=0.01"
                )
            if own.gpus > 1 and role != "rollout":
                raise ValueError(
                    f"resources.{role}.gpus={own.gpus:g}: a worker of this role computes on one "
                    f"GPU: set resources.{role}.gpus=1 and raise resources.{role}.num_workers"
                )
            _whole_beyond_one(f"resources.{role}.gpus", own.gpus)
        if self.gpus_per_worker > 1:
            raise ValueError(
                f"resources.gpus_per_worker={self.gpus_per_worker:g}: a worker computes on one "
                "GPU: set resources.gpus_per_worker=1 and raise resources.num_workers"
            )
        return self

    def role(self, role: Role) -> RoleResources:
        """Return what `role` gets."""
        roles: dict[Role, RoleResources] = {
            "actor": self.actor,
            "critic": self.critic,
            "reference": self.reference,
            "reward": self.reward,
            "rollout": self.rollout,
        }
        return roles[role]

    def bundles(self, stage: str) -> list[dict[str, float]]:
        """Return what `stage` asks of the cluster: one bundle of CPU and GPU per worker."""
        if stage == "ppo":
            return [
                {"CPU": self.role(role).cpus, "GPU": self.role(role).gpus}
                for role in ROLES
                for _ in range(self.role(role).num_workers)
            ]
        if stage in TRAINED_STAGES:
            return [{"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}] * self.num_workers
        return [{"CPU": 1.0}]


def _whole_beyond_one(key: str, gpus: float) -> None:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(
            f"{key}={gpus:g}: Ray shares out parts of one GPU, or whole ones: set {key}={int(gpus)}"
        )


class TokenizerConfig(Section):
    """A trained byte-level BPE, or an existing tokenizer."""

    path: str | None = None
    """Folder or hub name of an existing tokenizer; None trains one on the corpus."""
    vocab_size: Annotated[int, Field(ge=262)] = 4096
    """Size of the trained vocabulary: 256 bytes, the special tokens, and merges."""


class ModelConfig(Section):
    """An existing causal LM (`path`), or the shape of a Llama-like one trained from scratch."""

    path: str | None = None
    """Folder, hub name or `builtin:` name of an existing model; None starts from scratch."""
    hidden_size: Positive = 192
    num_layers: Positive = 4
    num_heads: Positive = 6
    num_kv_heads: Positive = 6
    intermediate_size: Positive = 512
    max_length: Positive = 128
    """Longest sequence in tokens, prompt and response together."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of "
                f"model.num_heads={self.num_heads}: set hidden_size="
                f"{max(1, self.hidden_size // self.num_heads) * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}: set num_kv_heads={self.num_heads}"
            )
        return self


Filter = Literal[
    "gopher",
    "gopher_word_count",
    "gopher_word_length",
    "gopher_symbols",
    "gopher_bullets",
    "gopher_ellipses",
    "gopher_alphabetic",
    "gopher_stop_words",
    "gopher_repeated_lines",
    "gopher_repeated_paragraphs",
    "gopher_top_ngram",
    "gopher_repeated_ngrams",
    "c4",
    "c4_sentences",
    "c4_lorem_ipsum",
    "c4_curly_bracket",
]
"""Rules of data/quality.py that drop documents; `gopher` and `c4` stand for all of theirs."""
Edit = Literal["c4_lines", "scrub_email", "scrub_ip"]
"""Rules of data/quality.py that change documents."""


class SourceConfig(Section):
    """One source of the pretraining mixture."""

    path: str
    """A file, a folder or a glob of documents, local or a URI (`s3://`, `hf://`), or a `builtin:`
    name; data/inputs.py lists the formats."""
    validation: str | None = None
    """Held-out documents of the source, for the loss per source."""
    test: str | None = None
    """Documents that only `evaluate` reads."""
    epochs: PositiveFloat | None = None
    """How often each document occurs in the mixture (default 1); a fraction takes a seeded sample.
    Source: the epochs column of LLaMA's data mixture (arXiv:2302.13971, table 1)."""
    weight: PositiveFloat | None = None
    """Instead of epochs: the source's share of the mixture's tokens, relative to the others.
    Source: the sampling proportion of the same table."""
    min_chars: Annotated[int, Field(ge=0)] | None = None
    """For this source, in place of the corpus's rule; so with the next three."""
    edits: tuple[Edit, ...] | None = None
    languages: tuple[str, ...] | None = None
    filters: tuple[Filter, ...] | None = None


class NearDuplicates(Section):
    """MinHash and locality-sensitive hashing over word n-grams (Broder 1997; Lee et al.,
    arXiv:2107.06499, section 4.2). A pair shares a band with probability
    1 - (1 - J^rows_per_band)^num_bands; of those, pairs are compared exactly."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Smallest Jaccard index J of two documents' n-grams that makes one of them a duplicate."""
    ngram: Positive = 5
    num_bands: Positive = 32
    rows_per_band: Positive = 8

    @model_validator(mode="after")
    def _bands_find_pairs_at_the_threshold(self) -> Self:
        found = 1 - (1 - self.threshold**self.rows_per_band) ** self.num_bands
        if found < 0.95:
            raise ValueError(
                f"near_duplicates: {self.num_bands} bands of {self.rows_per_band} rows find only "
                f"{found:.0%} of the pairs at threshold={self.threshold}: lower rows_per_band or "
                "raise num_bands"
            )
        return self


class CorpusConfig(Section):
    """Documents to rows of token ids."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    row_length: Positive = 128
    """T: tokens of one packed row."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream` cuts documents at the end of a row and pads nothing; `best_fit` keeps those of up
    to T tokens whole and pads (arXiv:2404.10830)."""
    total_tokens: Positive | None = None
    """Tokens of the mixture when sources have weights; default: as many as the sources hold."""
    min_chars: Annotated[int, Field(ge=0)] = 1
    """Documents shorter than this after cleaning are dropped and counted."""
    edits: tuple[Edit, ...] = ()
    """Changes of every text, before it is looked at: C4's lines, personal data."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes; documents in other languages are dropped. Empty: no identification."""
    language_score: Fraction = 0.65
    """Smallest confidence in the language (RefinedWeb, arXiv:2306.01116, section 3.1: 0.65)."""
    filters: tuple[Filter, ...] = ()
    """Rules that drop documents, counted by rule."""
    near_duplicates: NearDuplicates | None = None
    """Drop documents that are nearly those of another, in the whole corpus and its held-out texts;
    exact duplicates always go. `{}` takes the defaults."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluation sets, of any kind of record; documents that share an n-gram with them
    are dropped."""
    decontaminate_ngram: Positive = 13
    """Words (GPT-3, arXiv:2005.14165, appendix C: 13)."""
    on_error: Literal["fail", "skip"] = "fail"
    """A record or file that can't be read ends the job, or is named, counted and left out."""
    rows_per_shard: Positive = 8192

    @model_validator(mode="after")
    def _weights_or_epochs(self) -> Self:
        weighted = {name for name, source in self.sources.items() if source.weight is not None}
        for name, source in self.sources.items():
            if weighted and (source.weight is None or source.epochs is not None):
                raise ValueError(
                    f"corpus.sources: {min(weighted)} has a weight, and {name} "
                    f"{'has epochs' if source.epochs is not None else 'has none'}: give every "
                    "source a weight, or every source epochs"
                )
        if self.total_tokens is not None and not weighted:
            raise ValueError(
                f"corpus.total_tokens={self.total_tokens} needs sources with weights: give every "
                "source a weight, or take it out and set epochs"
            )
        return self


class TrainingConfig(Section):
    """What every trained model has: optimizer, schedule and backend."""

    tokens_per_microbatch: Positive = 4096
    """Padded tokens that one forward pass of one worker holds; bounds memory, not the result."""
    learning_rate: PositiveFloat = 9e-6
    """Peak learning rate (InstructGPT appendix C: 9e-6 for the reward model and for PPO)."""
    min_learning_rate_ratio: Fraction = 0.1
    """Final over peak learning rate of the cosine (GPT-3, arXiv:2005.14165: 0.1)."""
    warmup_ratio: Fraction = 0.0
    """Part of the steps with a linear warm-up."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    """0.95 in GPT-3, LLaMA and InstructGPT."""
    adam_eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.0
    """Decoupled decay (AdamW) of matrices; norms, biases and embeddings have none."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm (GPT-3: 1.0)."""
    backend: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; only with backend=deepspeed."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of forward and backward; master weights and optimizer stay in float32. `auto` takes bfloat16
    on devices that have instructions for it."""

    @model_validator(mode="after")
    def _zero_needs_deepspeed(self) -> Self:
        if self.zero_stage and self.backend != "deepspeed":
            raise ValueError(
                f"zero_stage={self.zero_stage} needs backend=deepspeed, not {self.backend}: "
                "set backend=deepspeed or zero_stage=0"
            )
        return self


class StageConfig(TrainingConfig):
    """A Ray Train stage: a training run with epochs, logging and checkpoints."""

    batch_size: Positive
    """Sequences (for `reward`: prompts) that one optimizer step sees, over all workers."""
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
    """Newest checkpoints to keep; `final/` is always kept."""


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
    weight_decay: NonNegative = 0.1
    """GPT-3 and LLaMA."""
    num_samples: Annotated[int, Field(ge=0)] = 5
    """How many times, evenly spaced, generated samples are printed while training."""
    sample_prompts: tuple[str, ...] = ("The movie",)
    """Openings that the printed samples continue."""


class SFTConfig(StageConfig):
    """Supervised fine-tuning on demonstrations; loss on the response only."""

    train: str
    """Demonstrations: `prompt` + `response`, or `messages`."""
    validation: str | None = None
    batch_size: Positive = 32
    """InstructGPT appendix C.1 (1.3B and 6B)."""
    learning_rate: PositiveFloat = 9.65e-6
    """InstructGPT appendix C.1 (1.3B and 6B)."""
    epochs: PositiveFloat = 16
    """InstructGPT section 3.5."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Residual dropout, InstructGPT section 3.5."""


class RewardConfig(StageConfig):
    """Reward model on ranked completions."""

    train: str
    """Comparisons: `prompt`, `responses` (K = 2 to 9), `ranks` (1 = best, ties allowed)."""
    validation: str | None = None
    demonstrations: str | None = None
    """Records whose mean score is shifted to 0; None takes `sft.train`."""
    batch_size: Positive = 64
    """Prompts per step (InstructGPT appendix C.2)."""
    learning_rate: PositiveFloat = 9e-6
    """InstructGPT appendix C.2."""
    epochs: PositiveFloat = 1
    """More overfits (InstructGPT appendix C.2)."""


class RoleTrainingConfig(TrainingConfig):
    """Training of PPO's actor or critic."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """The same in all processes that hold the model: no `auto`."""


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


class EvaluateConfig(Section):
    """Comparison of the stages on the same held-out prompts."""

    prompts: str
    """Held-out prompts, never used in PPO."""
    comparisons: str
    """Held-out comparisons, for the reward model."""
    num_prompts: Positive = 200
    max_response_tokens: Positive = 32
    temperature: PositiveFloat = 1.0
    batch_size: Positive = 16
    """Sequences of model.max_length that one forward pass holds; bounds memory, not the result.
    More is no faster on a CPU."""
    memory_gib: PositiveFloat = 0.5
    """KV cache of the engine that answers the prompts, GiB."""
    num_samples: Positive = 12
    """Prompts whose answers are shown side by side in the report."""


class Recipe(Section):
    """An experiment; the sections that a recipe has are the stages that `pipeline` runs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run and its folder."""
    seed: Annotated[int, Field(ge=0)] = 0
    run_dir: str = ""
    """Where everything is written, a local path or a `file://` URI; empty means runs/<name>."""
    resources: ResourcesConfig = ResourcesConfig()
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers beside metrics.jsonl. W&B and MLflow take address and key from environment variables
    of their own, on the node of the worker that logs."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    corpus: CorpusConfig | None = None
    pretrain: PretrainConfig | None = None
    sft: SFTConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    evaluate: EvaluateConfig | None = None

    @property
    def path(self) -> Path:
        """The run directory."""
        place = unquote(urlsplit(self.run_dir).path) if "://" in self.run_dir else self.run_dir
        return Path(place or f"runs/{self.name}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that this recipe has, in the order in which they run."""
        present = {
            "corpus": self.corpus,
            "pretrain": self.pretrain,
            "sft": self.sft,
            "reward": self.reward,
            "ppo": self.ppo,
            "evaluate": self.evaluate,
        }
        return tuple(stage for stage in STAGES if present[stage] is not None)

    @field_validator("run_dir")
    @classmethod
    def _is_a_local_path(cls, run_dir: str) -> str:
        if "://" in run_dir:
            uri = urlsplit(run_dir)
            if uri.scheme != "file" or uri.netloc not in ("", "localhost") or len(uri.path) < 2:
                raise ValueError(
                    f"run_dir={run_dir}: checkpoints need a file system: mount the bucket or share "
                    "on every node, and set run_dir to a path there, such as /mnt/bucket/runs/NAME"
                )
        return run_dir

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.pretrain is not None:
            if self.corpus is None and self.pretrain.corpus is None:
                raise ValueError(
                    "pretrain reads packed rows, but the recipe has no corpus section: "
                    "add corpus, set pretrain.corpus to a finished one, or take pretrain out "
                    "and set model.path"
                )
            if self.model.path is not None and self.tokenizer.path is None:
                raise ValueError(
                    f"model.path={self.model.path} has its own tokenizer, but tokenizer.path is "
                    f"empty: set tokenizer.path={self.model.path}"
                )
        elif self.model.path is None and self.stages not in ((), ("corpus",)):
            raise ValueError(
                "there is no model to start from: add a pretrain section, "
                "or set model.path to an existing model"
            )
        if self.tokenizer.path is None and self.corpus is None and self.model.path is None:
            raise ValueError(
                "there is no text to train a tokenizer on: add a corpus section, "
                "or set tokenizer.path to an existing tokenizer"
            )
        if self.corpus is not None and self.pretrain is not None:
            self._rows_fit(self.corpus)
        if self.ppo is not None:
            self._ppo_fits(self.ppo)
        return self

    def _rows_fit(self, corpus: CorpusConfig) -> None:
        if self.model.path is None and corpus.row_length > self.model.max_length:
            raise ValueError(
                f"corpus.row_length={corpus.row_length} is longer than "
                f"model.max_length={self.model.max_length}: set both to the same value"
            )

    def _ppo_fits(self, ppo: PPOConfig) -> None:
        if ppo.ptx_coef > 0 and self.corpus is None:
            raise ValueError(
                f"ppo.ptx_coef={ppo.ptx_coef} mixes in pretraining rows, but the "
                "recipe has no corpus section: add corpus, or set ppo.ptx_coef=0"
            )
        for role in ("actor", "critic"):
            ranks = self.resources.role(role).num_workers
            if ppo.minibatch_size % ranks:
                raise ValueError(
                    f"a minibatch of {ppo.minibatch_size} responses does not divide over "
                    f"resources.{role}.num_workers={ranks}: change ppo.batch_size or "
                    "ppo.num_minibatches"
                )
        head_size = self.model.hidden_size // self.model.num_heads
        on_cpu = self.resources.rollout.gpus == 0
        if on_cpu and self.model.path is None and head_size not in HEAD_SIZES:
            raise ValueError(
                f"model.hidden_size / model.num_heads = {head_size} is a head size that vLLM "
                f"cannot roll out on CPU: change one of the two to get one of "
                f"{', '.join(map(str, HEAD_SIZES))}"
            )
        if self.model.path is None and ppo.max_response_tokens >= self.model.max_length:
            raise ValueError(
                f"ppo.max_response_tokens={ppo.max_response_tokens} leaves no room for a prompt "
                f"within model.max_length={self.model.max_length}: set it lower"
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `key.sub=value` overrides, and check all of it.

    Values of overrides are YAML: `ppo.steps=20`, `sft=null`, `tracking=[tensorboard]`.
    Raises RecipeError with the value, the rule and the fix.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            str(file), [str(found) for found in sorted(file.parent.glob("*.y*ml"))], n=1, cutoff=0
        )
        raise RecipeError(
            f"{file}: no such recipe" + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{file}: a recipe is a mapping with at least `name:`, not {type(tree).__name__}"
        )
    for override in overrides:
        _apply(tree, override)
    return parse(tree, origin=str(file))


def parse(tree: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
    """Build a Recipe from plain data; `origin` opens the message of a RecipeError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [
            _explain(found["loc"], found["type"], found["msg"], found.get("input"))
            for found in error.errors()
        ]
        more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
        raise RecipeError(f"{origin}: " + "\n".join(lines[:2]) + more) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in `tree`, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override}: an override is key.sub=value, for example ppo.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"{override}: the value is not valid YAML; quote it") from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"{override}: {parent} is the value {child!r}, not a section")
        node = child
    node[leaf] = value


def _fields(loc: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section that holds the last key of `loc`."""
    section: type[BaseModel] = Recipe
    for key in loc[:-1]:
        field = section.model_fields.get(str(key))
        if field is None:
            return list(SourceConfig.model_fields) if "sources" in loc else []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            continue
        section = found[0]
    return list(SourceConfig.model_fields if "sources" in loc[:-1] else section.model_fields)


def _explain(loc: Sequence[int | str], kind: str, message: str, value: Any) -> str:
    """Turn one pydantic error into the value, the rule and the fix."""
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _fields(loc), n=1, cutoff=0)
        return f"unknown key {key}: did you mean {'.'.join([*map(str, loc[:-1]), *near])}?"
    if kind == "missing":
        return f"{key} is missing: add it to the recipe, or pass {key}=VALUE"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    rule = message[0].lower() + message[1:]
    return f"{key}={value!r}: {rule}; set {key} to a value that fits"
