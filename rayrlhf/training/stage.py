"""What a stage plugs into the loop: model, data, loss, evaluation, and what a micro-batch is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from rayrlhf import lineage
from rayrlhf.config import Recipe, StageConfig
from rayrlhf.data import builtin, encoded
from rayrlhf.data.datasets import Example, records_between, shard
from rayrlhf.data.encoded import Encoded, token_counts
from rayrlhf.data.tokenizer import check_vocabulary, load_tokenizer
from rayrlhf.models import lora
from rayrlhf.models.folder import load_config
from rayrlhf.models.sequence import check_splits
from rayrlhf.training.backend import Backend, learning_rate
from rayrlhf.training.best import Selection
from rayrlhf.training.schedule import BatchSizes

Item = TypeVar("Item")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank sees; b sequences, right-padded to S tokens."""

    input_ids: Tensor
    """(b, S) int64"""
    attention_mask: Tensor
    """(b, S) int64, 1 on tokens"""
    count: float
    """What the step's denominator counts here: tokens with loss, or comparisons."""
    num_tokens: int
    """Tokens without padding."""

    @property
    def num_outputs(self) -> int:
        """How many tokens the output layer is asked for."""
        return round(self.count)

    def to(self, device: torch.device) -> Self:
        """Return a copy on `device`."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := self.__dict__[field.name], Tensor)
        }
        return replace(self, **moved)


class Stage(ABC):
    """A training stage on one rank. The driver makes one, too, to check the inputs."""

    name: str
    """Of the recipe's section and of the folder in the run directory."""
    selection: ClassVar[Selection] = Selection("eval/loss", higher_is_better=False)
    """By which metric of `evaluate` early stopping tells the best checkpoint."""

    def __init__(self, recipe: Recipe) -> None:
        """Read and check the data; raises RecipeError."""
        self.recipe = recipe
        self.folder = recipe.path / self.name
        self.tokenizer = load_tokenizer(recipe)

    @classmethod
    def runs(cls, recipe: Recipe) -> Iterator["Stage"]:
        """Yield what is trained, one after another: most stages have one model."""
        yield cls(recipe)

    @classmethod
    def finals(cls, recipe: Recipe) -> list[Path]:
        """Return the folder of each model of `runs`, the one that later stages read first."""
        return [recipe.path / cls.name / "final"]

    @property
    @abstractmethod
    def cfg(self) -> StageConfig:
        """The recipe's section of this stage."""

    @property
    @abstractmethod
    def num_records(self) -> int:
        """Training records: rows, demonstrations or comparisons."""

    @property
    def batch_sizes(self) -> BatchSizes:
        """Records of each optimizer step."""
        return BatchSizes(self.cfg.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps: `epochs` over the records, the last batch filled from the next epoch."""
        steps = self.batch_sizes.steps(round(self.cfg.epochs * self.num_records))
        return max(1, steps if self.cfg.max_steps is None else min(steps, self.cfg.max_steps))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0)."""
        return learning_rate(step, self.cfg, self.total_steps)

    def batch(self, step: int) -> list[int]:
        """Return the records of optimizer step `step` (from 0)."""
        sizes = self.batch_sizes
        return records_between(
            sizes.before(step),
            sizes.before(step + 1),
            seed=self.recipe.seed,
            num_records=self.num_records,
        )

    @abstractmethod
    def build(self, checkpoint: Path | None) -> nn.Module:
        """Return the model to start from, or that of `checkpoint`."""

    @abstractmethod
    def costs(self, indices: Sequence[int]) -> list[float] | None:
        """Return what each record costs in tokens, to balance the ranks; None: all the same."""

    @abstractmethod
    def microbatches(self, indices: Sequence[int]) -> list[Any]:
        """Return training records as micro-batches within `tokens_per_microbatch`."""

    @abstractmethod
    def empty(self) -> Any:
        """Return a micro-batch whose loss is 0: what a rank with less to do adds."""

    @abstractmethod
    def loss(self, backend: Backend, micro: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss_sum, sums to log); the caller divides by the step's count."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """Return the metrics from the sums of `loss` over all micro-batches of all ranks."""

    @abstractmethod
    def evaluate(self, backend: Backend) -> dict[str, float]:
        """Return `eval/...` metrics on held-out data; {} without any. Every rank calls it."""

    def held_out_metrics(self, backend: Backend, micros: Sequence[MicroBatch]) -> dict[str, float]:
        """Return `eval/...` of this rank's held-out micro-batches and the others'."""
        with evaluating(backend):
            sums, count = global_totals(self, backend, micros)
        return {f"eval/{name}": value for name, value in self.metrics(sums, count).items()}

    def start_folder(self) -> str:
        """Return the folder of the model that the stage before left, or that the recipe names.

        Raises RecipeError unless the section's `lora` fits it, and see `check_model`.
        """
        folder = builtin.resolve(lineage.start_model(self.recipe, self.name))
        self.check_model(folder)
        lora.check(folder, self.cfg)
        return folder

    def check_model(self, folder: str) -> None:
        """Raise RecipeError unless the tokenizer fits a model, and its attention the ranks."""
        config = load_config(folder)
        check_vocabulary(self.tokenizer, config.vocab_size)
        check_splits(config, self.recipe.resources)

    def read_demonstrations(self, path: str) -> Encoded[Example]:
        """Return the demonstrations of a file as token ids; raises RecipeError."""
        return encoded.demonstrations(self.recipe, path, self.recipe.model.max_length)

    def samples(self, backend: Backend, step: int) -> list[dict[str, Any]]:
        """Return generated texts to show after `step`; every rank calls it."""
        del backend, step
        return []

    def prepare(self, backend: Backend, *, resumed: bool) -> None:
        """Do what is due before the first step of this process; every rank calls it.

        `resumed`: the module has the weights of a checkpoint, not those of the start model.
        """
        del backend, resumed

    def norm_limit(self, metrics: Mapping[str, float]) -> float:
        """Return the largest gradient norm that updates after a step's metrics; -1: none does."""
        del metrics
        return math.inf

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        """Take the metrics of step `step` (from 1); return what there is to note, with a `text`."""
        del step, metrics
        return None

    def save_state(self, folder: Path) -> None:
        """Write what the stage itself has to remember into a checkpoint; one rank calls it."""
        del folder

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`; every rank calls it."""
        del folder

    def finish(self, backend: Backend) -> None:
        """Do what is due between the last step and saving `final`; every rank calls it."""
        del backend

    @abstractmethod
    def save(self, module: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the Hugging Face folder, without the tokenizer; one rank calls it."""


@contextmanager
def evaluating(backend: Backend) -> Iterator[None]:
    """Switch dropout and gradients off in the block."""
    backend.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backend.module.train()


def own_share(backend: Backend, items: Sequence[Item]) -> list[Item]:
    """Return this rank's part of encoded items, balanced by their tokens."""
    lengths = token_counts(items)
    mine = shard(range(len(items)), backend.data_rank, backend.data_size, lengths)
    return [items[index] for index in mine]


def global_totals(
    stage: Stage, backend: Backend, micros: Sequence[MicroBatch]
) -> tuple[dict[str, float], float]:
    """Return the sums of `stage.loss` and the count over the micro-batches of all ranks.

    Every rank calls it, whatever the number of its micro-batches. Meant for `evaluating`.
    """
    totals: dict[str, Tensor] = {}
    for micro in padded(stage, backend, micros):
        _, sums = stage.loss(backend, micro.to(backend.device))
        add(totals, sums)
    *values, count = backend.global_sums(
        [*(float(total) for total in totals.values()), sum(micro.count for micro in micros)]
    )
    return dict(zip(totals, values, strict=True)), count


def padded(stage: Stage, backend: Backend, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Add empty micro-batches until every rank has as many: ZeRO-3 forwards are collective."""
    wanted = max(1, int(backend.global_max(len(micros))))
    return [*micros, *(stage.empty() for _ in range(wanted - len(micros)))]


def add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add `sums` to `totals`, in place, without waiting for the device."""
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value
