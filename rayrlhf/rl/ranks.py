"""What the ranks of a role share: settings, device, meeting point, and their part of the rows."""

import datetime
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from rayrlhf.config import PPOConfig, TrainingConfig
from rayrlhf.models import lora
from rayrlhf.models.causal_lm import CausalLMModel
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl.clock import Clock, Span
from rayrlhf.rl.experience import (
    Rollout,
    RowReader,
    TokenBatch,
    minibatches,
    rank_microbatches,
)
from rayrlhf.training.backend import Backend, forward_precision, make_backend
from rayrlhf.training.checkpoint import STATE_DIR
from rayrlhf.training.flops import ModelFlops, attended_pairs, model_flops
from rayrlhf.training.utilization import matmul_rate


@dataclass(frozen=True)
class RoleSettings:
    """What a worker has to know; `launch` fills in what follows `rank`."""

    ppo: PPOConfig
    model_path: str
    """Hugging Face folder: of the start model, or of the checkpoint to resume from."""
    state_path: str | None
    """Folder of the optimizer state to resume from (actor and critic)."""
    adapter_path: str | None
    """Folder of the adapters to go on with, beside `model_path` (actor and critic)."""
    tokenizer_path: str
    corpus_path: str
    """Folder of the packed rows, for PPO-ptx."""
    documents_apart: bool
    """Whether documents of a packed row do not see each other, as in pretraining."""
    actor_ranks: int
    """Workers of the actor, on whose micro-batches the reference works."""
    max_length: int
    """Longest prompt plus response, tokens."""
    pad_id: int
    eos_id: int
    seed: int
    num_threads: int
    rewards: tuple[tuple[str, ...], ...] = ()
    """Where each of `ppo.rewards` is: folders of its models, its function, or its URL (reward)."""
    zero_head: bool = False
    """Whether `model_path` is a causal LM, which gets a head of zeros (critic)."""
    gpu_memory: float = 0.9
    """Part of a GPU's memory that an engine takes."""
    rank: int = 0
    world_size: int = 1
    num_gpus: float = 0
    spread: tuple[int, ...] = ()
    """Bundles of the GPUs of an engine that has several, each shared with other roles."""
    gpu_share: float = 0
    """Part of each of these GPUs."""
    takes_turns: bool = False
    """Whether other roles need the device's memory between this one's calls."""
    host: str = "127.0.0.1"
    """Address of the node of the role's rank 0."""


class Worker:
    """What every role has: settings, threads and a device."""

    def __init__(self, settings: RoleSettings) -> None:
        self.settings = settings
        self.cfg = settings.ppo
        self.device = torch.device("cuda:0" if settings.num_gpus else "cpu")
        self.clock = Clock()
        torch.set_num_threads(settings.num_threads)

    def read_clock(self) -> list[Span]:
        """Return the phases that ran since the last reading."""
        return self.clock.read()

    def start_trace(self) -> None:
        """Record what runs from now on."""
        self.clock.start_trace()

    def stop_trace(self, path: str) -> None:
        """Write a trace of what ran since `start_trace` to `path`, followed by the rank."""
        self.clock.stop_trace(f"{path}-{self.settings.rank}.json.gz")

    def matmul_rate(self) -> float:
        """Measure FLOP/s of plain matmuls with this worker's device, precision and threads."""
        is_float32 = self.cfg.actor.precision == "float32"
        return matmul_rate(self.device, torch.float32 if is_float32 else torch.bfloat16)


class ModelWorker(Worker):
    """A rank of a role that holds a model of torch."""

    training: TrainingConfig
    """Of the role; `reference` and `reward` have that of the trained role of the same model."""
    _forward_flops: ModelFlops | None = None
    _whole_flops: ModelFlops | None = None

    def __init__(self, settings: RoleSettings) -> None:
        super().__init__(settings)
        self._flops: dict[torch.nn.Module, tuple[ModelFlops, ModelFlops]] = {}

    def know_flops(self, module: torch.nn.Module) -> None:
        """Count passes as those of `module` from now on, under `ppo.profile`.

        At the first call for a module its weights are whole.
        """
        if not self.cfg.profile:
            return
        if module not in self._flops:
            self._flops[module] = model_flops(module, forward_only=True), model_flops(module)
        self._forward_flops, self._whole_flops = self._flops[module]

    def count(self, micro: TokenBatch, *, backward: bool = False) -> None:
        """Add the FLOPs of a pass over a micro-batch to the phase that runs."""
        if self._forward_flops is None or self._whole_flops is None:
            return
        tokens = {
            "num_tokens": int(micro.attention_mask.sum()) if micro.indices else 0,
            "num_pairs": attended_pairs(micro.attention_mask) if micro.indices else 0,
            "num_outputs": int(micro.mask.sum()),
        }
        forward = self._forward_flops.total(**tokens)
        self.clock.count(self._whole_flops.total(**tokens) - forward if backward else forward)

    def plans_of(
        self, rollout: Rollout, step: int, epoch: int, world_size: int
    ) -> Iterator[tuple[list[int], list[list[list[int]]]]]:
        """Yield (rows of a minibatch, its micro-batches for each of `world_size` ranks)."""
        lengths = rollout.lengths
        for rows in minibatches(
            len(rollout), self.cfg.num_minibatches, seed=self.settings.seed, step=step, epoch=epoch
        ):
            yield (
                rows,
                rank_microbatches(
                    rows,
                    lengths,
                    world_size=world_size,
                    tokens_per_microbatch=self.training.tokens_per_microbatch,
                ),
            )


class InferenceWorker(ModelWorker):
    """A rank of `reference` or `reward`: computes as the trained role of the same model does."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that the trained role's forward reads."""
        is_bfloat16 = forward_precision(self.training, self.device) == "bfloat16"
        return torch.bfloat16 if is_bfloat16 else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast that the trained role's forward runs under, if any."""
        if forward_precision(self.training, self.device) == "autocast":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


class TrainedWorker(ModelWorker, ABC):
    """A rank of `actor` or `critic`."""

    role = ""
    _store: dist.TCPStore | None = None
    evaluated = -1
    """The step whose rollout was evaluated last."""

    def __init__(self, settings: RoleSettings) -> None:
        super().__init__(settings)
        self._kept: dict[tuple[int, ...], Any] = {}
        """Outputs of the forward passes whose graphs wait for `update`, by the rows."""

    def address(self) -> tuple[str, int]:
        """Open the meeting point of the ranks (rank 0 only); returns host and port."""
        if self.settings.world_size > 1:
            self._store = dist.TCPStore(
                self.settings.host,
                0,
                self.settings.world_size,
                is_master=True,
                wait_for_workers=False,
            )
            return self.settings.host, self._store.port
        return self.settings.host, 0

    def start(self, address: tuple[str, int]) -> None:
        """Join the other ranks at `address`, and load."""
        settings = self.settings
        if settings.world_size > 1:
            timeout = datetime.timedelta(seconds=self.cfg.deadline_s)
            store = self._store or dist.TCPStore(
                *address, settings.world_size, is_master=False, timeout=timeout
            )
            dist.init_process_group(
                "nccl" if settings.num_gpus else "gloo",
                store=store,
                rank=settings.rank,
                world_size=settings.world_size,
                timeout=timeout,
            )
        self.load()

    def load(self) -> None:
        """Load the model and, on resume, the optimizer; every rank calls it."""
        module = self.load_module()
        self._add_adapters(module.hf)
        self.know_flops(module)
        updates_per_step = self.cfg.epochs * self.cfg.num_minibatches
        self.backend: Backend = make_backend(
            module,
            self.training,
            device=self.device,
            total_steps=max(1, self.cfg.steps - self.first_step) * updates_per_step,
        )
        # Every dropout is 0 in either mode, and transformers recomputes layers in one of them only.
        module.train(self.training.gradient_checkpointing)
        if self.settings.state_path is not None:
            self.backend.load_state(self.settings.state_path)

    def _add_adapters(self, model: PreTrainedModel) -> None:
        """Train adapters instead of the weights if `ppo.lora` or the role's own `lora` says so."""
        cfg, saved = self.cfg.lora_of(self.role), self.settings.adapter_path
        if cfg is not None:
            lora.add_adapter(
                model,
                cfg,
                base=self.settings.model_path,
                seed=self.settings.seed,
                folder=None if saved is None else Path(saved),
            )

    def rest(self, asleep: bool) -> None:
        """Leave the device's memory to another role, or take it again (turns.py)."""
        if self.device.type != "cpu":  # there it would only be copied
            self.backend.rest(asleep)

    @abstractmethod
    def load_module(self) -> CausalLMModel | ScalarHeadModel:
        """Return the model to train."""

    @property
    def first_step(self) -> int:
        """The PPO step from which on this model is trained: there its schedule begins."""
        return 0

    def schedule_from(self, step: int) -> None:
        """Let the next update have the learning rate of the first one of PPO step `step`.

        The rate follows from the step, as the prompts do: neither a step without an update (KL
        budget) nor an update without a finite gradient (`Backend.step`) holds the schedule up, and
        it ends with the run. DeepSpeed and accelerate do hold it up, for the updates that a float16
        loss scale skips until it is found; there is none here.
        """
        updates = self.cfg.epochs * self.cfg.num_minibatches
        self.backend.num_steps = max(0, step - self.first_step) * updates

    def minibatches_of(
        self, rollout: Rollout, step: int, epoch: int
    ) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield (response tokens of the whole minibatch, this rank's micro-batches)."""
        world_size = self.settings.world_size
        for rows, plans in self.plans_of(rollout, step, epoch, world_size):
            yield int(rollout.response_lengths[rows].sum()), plans[self.settings.rank]

    def forward_once(
        self, reader: RowReader, step: int, *, updates: bool
    ) -> Iterator[tuple[TokenBatch, Any]]:
        """Yield the micro-batches of the first epoch with what `outputs` says of them.

        Where `updates` follows in this step, graphs of the first minibatch are kept: its weights
        are those that `update` starts from, so that a forward pass serves both. They come last,
        next to their backward passes.
        """
        self._kept, self.evaluated = {}, step
        parts = [part for _, part in self.minibatches_of(reader.rollout, step, epoch=0)]
        kept = self._num_graphs(parts[0], reader.rollout.lengths) if updates else 0
        groups = [group for part in parts for group in part]
        for number, group in reversed(list(enumerate(groups))):
            micro = reader.tokens(group).to(self.device)
            with torch.set_grad_enabled(number < kept):
                found = self.outputs(micro, True)
            self.count(micro)
            if number < kept:
                self._kept[tuple(group)] = found
            yield micro, found

    def _num_graphs(self, groups: list[list[int]], lengths: list[int]) -> int:
        """Return how many of the first micro-batches may keep their graphs at the same time.

        As many as take together the memory of one micro-batch, which training needs anyway. Where a
        forward gathers weights from all ranks it is one: all ranks have to keep alike, and ZeRO-3
        gives weights back for one graph only.
        """
        if self.training.backend == "fsdp" or self.training.zero_stage == 3:
            return min(1, len(groups))
        sizes = [len(group) * max((lengths[row] for row in group), default=0) for group in groups]
        within = sum(size <= self.training.tokens_per_microbatch for size in accumulate(sizes))
        return min(max(1, within), len(groups))

    def kept_or_new(self, micro: TokenBatch, step: int, *, with_metrics: bool) -> Any:
        """Return `outputs` with their graph: those that `forward_once` kept, or new ones."""
        kept = self._kept.pop(tuple(micro.indices), None) if step == self.evaluated else None
        if kept is not None:
            return kept
        self.count(micro)
        return self.outputs(micro, with_metrics)

    @abstractmethod
    def outputs(self, micro: TokenBatch, with_metrics: bool) -> Any:
        """Run the model over a micro-batch."""

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Add up over the ranks; every rank has the same names."""
        return dict(zip(sums, self.backend.global_sums(list(sums.values())), strict=True))

    def state_folder(self, folder: str) -> Path:
        """Make and return the role's part of a checkpoint's training state."""
        state = Path(folder) / STATE_DIR / self.role
        state.mkdir(parents=True, exist_ok=True)
        return state


def unpadded(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the rows of (b, T) without their padding, on the CPU."""
    lengths = mask.sum(dim=1).int().tolist()
    return [
        row[:length] for row, length in zip(padded.detach().float().cpu(), lengths, strict=True)
    ]


def add(sums: dict[str, float], metrics: dict[str, Tensor]) -> None:
    """Add metrics to `sums`, in place."""
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value)
