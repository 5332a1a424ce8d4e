"""The whole recipe, and the rules that hold between its sections."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.corpus import CorpusConfig
from rayrlhf.config.dpo import DPOConfig
from rayrlhf.config.evaluate import EvaluateConfig
from rayrlhf.config.judges import JudgeConfig
from rayrlhf.config.label import LabelConfig
from rayrlhf.config.model import ModelConfig, TokenizerConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.resources import ROLES, ResourcesConfig, Role
from rayrlhf.config.reward import RewardConfig
from rayrlhf.config.rounds import RoundsConfig
from rayrlhf.config.section import Section
from rayrlhf.config.serve import ServeConfig
from rayrlhf.config.sizes import fill
from rayrlhf.config.training import PretrainConfig, SFTConfig, StageConfig

STAGES = ("corpus", "pretrain", "sft", "reward", "dpo", "ppo", "rounds", "evaluate")
# Attention of vLLM 0.32 on CPU has kernels for these sizes of a head only; GPUs have them all.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


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
    dpo: DPOConfig | None = None
    ppo: PPOConfig | None = None
    rounds: RoundsConfig | None = None
    evaluate: EvaluateConfig | None = None
    label: LabelConfig | None = None
    """No stage: `pipeline` leaves it to `rayrlhf label`, which runs as long as people judge."""
    serve: ServeConfig | None = None
    """No stage either: `rayrlhf serve` answers until it is stopped."""

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
            "dpo": self.dpo,
            "ppo": self.ppo,
            "rounds": self.rounds,
            "evaluate": self.evaluate,
        }
        return tuple(stage for stage in STAGES if present[stage] is not None)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that PPO runs, in the order of ROLES: no critic where the learner has none."""
        has_critic = self.ppo is None or self.ppo.has_critic
        return tuple(role for role in ROLES if has_critic or role != "critic")

    @property
    def judges(self) -> dict[str, JudgeConfig]:
        """The judges that the recipe brings, by their place in it."""
        found: dict[str, JudgeConfig] = {}
        if self.rounds is not None and isinstance(self.rounds.judge, JudgeConfig):
            found["rounds.judge"] = self.rounds.judge
        for index, judge in enumerate(self.evaluate.judges if self.evaluate else ()):
            found[f"evaluate.judges.{index}"] = judge
        return found

    def training(self, stage: str) -> StageConfig | None:
        """Return the section of a stage that Ray Train runs; None for another, or without one."""
        sections: dict[str, StageConfig | None] = {
            "pretrain": self.pretrain,
            "sft": self.sft,
            "reward": self.reward,
            "dpo": self.dpo,
        }
        return sections.get(stage)

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_size(cls, tree: Any) -> Any:
        return fill(tree) if isinstance(tree, dict) else tree

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
        texts = (self.tokenizer.path, self.corpus, self.model.path)
        stands_alone = self.label is not None or self.serve is not None
        if all(each is None for each in texts) and (self.stages or not stands_alone):
            raise ValueError(
                "there is no text to train a tokenizer on: add a corpus section, "
                "or set tokenizer.path to an existing tokenizer"
            )
        if self.corpus is not None and self.pretrain is not None:
            self._rows_fit(self.corpus)
        if self.ppo is not None:
            self._ppo_fits(self.ppo)
        if self.rounds is not None:
            self._rounds_fit(self.rounds)
        if self.evaluate is not None:
            self._evaluation_fits(self.evaluate)
        if self.label is not None:
            self.label.check_work(
                of_rounds=self.rounds is not None and self.rounds.judge == "people"
            )
            self._answers_fit(self.label)
        if self.resources.sequence_parallel > 1:
            self._sequences_split()
        return self

    @model_validator(mode="after")
    def _served_names_differ(self) -> Self:
        if self.serve is not None:
            self.serve.check_names(self.name)
        return self

    def _rows_fit(self, corpus: CorpusConfig) -> None:
        if self.model.path is None and corpus.row_length > self.model.max_length:
            raise ValueError(
                f"corpus.row_length={corpus.row_length} is longer than "
                f"model.max_length={self.model.max_length}: set both to the same value"
            )

    def _weights_can_be_broadcast(self) -> None:
        resources = self.resources
        actor, rollout = resources.actor, resources.rollout
        reason = None
        if resources.layout == "colocated":
            reason = "resources.layout=colocated: NCCL has one process per device"
        elif rollout.shares == "actor" or actor.shares == "rollout":
            reason = "actor and rollout on one device: NCCL has one process per device"
        elif (actor.gpus > 0) != (rollout.gpus > 0):
            reason = (
                f"resources.actor.gpus={actor.gpus:g} and resources.rollout.gpus={rollout.gpus:g}: "
                "either both are on GPUs, or none is"
            )
        if reason is not None:
            raise ValueError(
                f"ppo.weight_transfer=broadcast does not go with {reason}: set "
                "ppo.weight_transfer=object_store"
            )

    def _sequences_split(self) -> None:
        if self.pretrain is not None and (self.model.path or self.pretrain.init) is None:
            self.resources.check_heads(self.model.num_heads, self.model.num_kv_heads)
        ranks = self.resources.sequence_parallel
        for stage in (self.pretrain, self.sft, self.reward, self.dpo):
            if stage is not None and stage.compile:
                raise ValueError(
                    f"compile=true does not go with resources.sequence_parallel={ranks}, whose "
                    "attention exchanges tokens between ranks: set compile=false"
                )
            if stage is not None and stage.attention == "flex":
                raise ValueError(
                    f"attention=flex does not go with resources.sequence_parallel={ranks}, which "
                    "computes each document by itself: set attention=auto"
                )

    def _rounds_fit(self, rounds: RoundsConfig) -> None:
        if self.reward is None or self.ppo is None:
            missing = "reward" if self.reward is None else "ppo"
            raise ValueError(
                f"rounds go on after reward and ppo, but the recipe has no section {missing}: add "
                "it, or take rounds out"
            )
        if self.ppo.rewards:
            raise ValueError(
                "rounds train a new reward model for PPO each, and ppo.rewards names others: take "
                "one of the two out"
            )
        if rounds.judge == "people" and self.label is None:
            raise ValueError(
                "rounds.judge=people asks people on the page of `rayrlhf label`, but the recipe "
                "has no section label: add label.labellers, or name another rounds.judge"
            )

    def _evaluation_fits(self, evaluate: EvaluateConfig) -> None:
        if evaluate.few_shot is not None and self.sft is None:
            raise ValueError(
                "evaluate.few_shot shows demonstrations of sft.train, but the recipe has no sft "
                "section: add sft, or take evaluate.few_shot out"
            )
        if evaluate.overoptimisation is None:
            return
        if self.reward is None:
            raise ValueError(
                "evaluate.overoptimisation compares the reward model with a gold one, but the "
                "recipe has no reward section: add reward, or take evaluate.overoptimisation out"
            )
        if evaluate.overoptimisation.gold is None and self.reward.gold is None:
            raise ValueError(
                "evaluate.overoptimisation has no gold reward model: set reward.gold.train to "
                "comparisons of its own, or evaluate.overoptimisation.gold to a finished one"
            )

    def _answers_fit(self, label: LabelConfig) -> None:
        for key, part in (("sample", label.sample), ("arena", label.arena)):
            if part is not None and part.max_response_tokens >= self.model.max_length:
                raise ValueError(
                    f"label.{key}.max_response_tokens={part.max_response_tokens} leaves no room "
                    f"for a prompt within model.max_length={self.model.max_length}: set it lower"
                )

    def _ppo_fits(self, ppo: PPOConfig) -> None:
        if ppo.ptx_coef > 0 and self.corpus is None:
            raise ValueError(
                f"ppo.ptx_coef={ppo.ptx_coef} mixes in pretraining rows, but the "
                "recipe has no corpus section: add corpus, or set ppo.ptx_coef=0"
            )
        for role in self.roles[: 1 + ppo.has_critic]:
            ranks = self.resources.role(role).num_workers
            if ppo.minibatch_size % ranks:
                raise ValueError(
                    f"a minibatch of {ppo.minibatch_size} responses does not divide over "
                    f"resources.{role}.num_workers={ranks}: change ppo.batch_size or "
                    "ppo.num_minibatches"
                )
        if ppo.max_staleness and self.resources.layout == "colocated":
            raise ValueError(
                f"ppo.max_staleness={ppo.max_staleness} rolls out while the learner trains, and "
                "with resources.layout=colocated they take turns: set resources.layout="
                "disaggregated, or ppo.max_staleness=0"
            )
        if ppo.weight_transfer == "broadcast":
            self._weights_can_be_broadcast()
        engines = self.resources.rollout.num_workers
        if ppo.stale == "drop" and ppo.batch_size % engines:
            raise ValueError(
                f"ppo.stale=drop learns from whole parts of a batch, and ppo.batch_size="
                f"{ppo.batch_size} does not divide over resources.rollout.num_workers={engines}: "
                "change one of the two, or set ppo.stale=wait"
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
