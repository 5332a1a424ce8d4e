"""The five roles of PPO: plain classes, one object per process, that know nothing of Ray.

actor      policy in training: log_probs, update, weights
critic     value function in training: values, update
reference  the policy as it was at the start: log_probs
reward     reward model: score
rollout    engine: generate, load_weights

All ranks of a trained role call the same method with the same arguments and work on their own part
of the rows (see experience.py). Dropout is off in every role: models stay in eval mode.
"""

import datetime
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rayrlhf.algorithms.losses import negative_log_likelihood, ppo_policy_loss, ppo_value_loss
from rayrlhf.config import PPOConfig, TrainingConfig
from rayrlhf.data.datasets import PackedRows, batch_indices, shard
from rayrlhf.data.packing import microbatches
from rayrlhf.generation import Engine, request_seed
from rayrlhf.models.causal_lm import CausalLMModel, named_weights
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores, values_before
from rayrlhf.rl.experience import (
    Experience,
    Rollout,
    RowReader,
    TokenBatch,
    minibatches,
    rank_microbatches,
)
from rayrlhf.training.backend import Backend, make_backend
from rayrlhf.training.checkpoint import STATE_DIR

Rows = tuple[list[int], list[Tensor]]
"""Rows of a rollout that a rank worked on: their indices, and one tensor per row."""


@dataclass(frozen=True)
class RoleSettings:
    """What a worker has to know; `launch` fills in the last four."""

    ppo: PPOConfig
    model_path: str
    """Hugging Face folder: of the start model, or of the checkpoint to resume from."""
    state_path: str | None
    """Folder of the optimizer state to resume from (actor and critic)."""
    tokenizer_path: str
    corpus_path: str
    """Folder of the packed rows, for PPO-ptx."""
    max_length: int
    """Longest prompt plus response, tokens."""
    pad_id: int
    eos_id: int
    seed: int
    num_threads: int
    rank: int = 0
    world_size: int = 1
    num_gpus: float = 0
    host: str = "127.0.0.1"
    """Address of the node of the role's rank 0."""


class Worker:
    """What every role has: settings, threads and a device."""

    def __init__(self, settings: RoleSettings) -> None:
        self.settings = settings
        self.cfg = settings.ppo
        self.device = torch.device("cuda:0" if settings.num_gpus else "cpu")
        torch.set_num_threads(settings.num_threads)


class InferenceWorker(Worker):
    """A rank of `reference` or `reward`: takes its share of the rows, whatever the minibatches."""

    training: TrainingConfig
    """Of the trained role with the same model: same precision, same micro-batches."""

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.training.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _microbatches(self, rollout: Rollout) -> Iterator[TokenBatch]:
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        lengths = rollout.lengths
        mine = shard(range(len(rollout)), self.settings.rank, self.settings.world_size, lengths)
        for group in microbatches([lengths[i] for i in mine], self.training.tokens_per_microbatch):
            yield reader.tokens([mine[position] for position in group]).to(self.device)


class ReferenceWorker(InferenceWorker):
    """The policy that the KL penalty is measured against; it never changes."""

    def start(self) -> None:
        """Load the model."""
        self.training = self.cfg.actor
        self.model = CausalLMModel.from_pretrained(self.settings.model_path)
        self.model.to(self.device).eval()

    @torch.no_grad()
    def log_probs(self, rollout: Rollout) -> Rows:
        """Return log-probs of the response tokens, nats, at the sampling temperature."""
        indices: list[int] = []
        rows: list[Tensor] = []
        for micro in self._microbatches(rollout):
            with self._autocast():
                log_probs = response_log_probs(self.model, micro, self.cfg.temperature)
            indices += micro.indices
            rows += unpadded(log_probs, micro.mask)
        return indices, rows


class RewardWorker(InferenceWorker):
    """The reward model: one score per response, read at its last token."""

    def start(self) -> None:
        """Load the model with its shift."""
        self.training = self.cfg.critic
        self.model = ScalarHeadModel.from_pretrained(self.settings.model_path)
        self.model.to(self.device).eval()

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rows:
        """Return the score of each response; 0 is the mean score of the demonstrations."""
        indices: list[int] = []
        rows: list[Tensor] = []
        for micro in self._microbatches(rollout):
            with self._autocast():
                scores = self.model(micro.input_ids, micro.attention_mask)            # (b, S)
            last = last_scores(scores, micro.attention_mask.sum(dim=1))               # (b,)
            indices += micro.indices
            rows += list(last.cpu().unsqueeze(1))
        return indices, rows


class RolloutWorker(Worker):
    """One engine."""

    def start(self) -> None:
        """Load the engine."""
        settings = self.settings
        self.engine = Engine(
            settings.model_path, max_length=settings.max_length, dtype=self.cfg.actor.precision,
            memory_gib=self.cfg.rollout_memory_gib, seed=settings.seed,
            num_threads=settings.num_threads, tensor_parallel=max(1, int(settings.num_gpus)),
            eos_token_id=settings.eos_id)

    def generate(self, prompts: list[list[int]], first: int, step: int) -> Rollout:
        """Sample G responses per prompt; prompts[0] is number `first` of the step's batch."""
        samples = range(self.cfg.samples_per_prompt)
        repeated = [prompt for prompt in prompts for _ in samples]
        seeds = [request_seed(self.settings.seed, step, first + number, sample)
                 for number in range(len(prompts)) for sample in samples]
        completions = self.engine.generate(
            repeated, max_tokens=self.cfg.max_response_tokens,
            temperature=self.cfg.temperature, seeds=seeds)
        return Rollout.from_completions(repeated, completions)

    def load_weights(self, weights: dict[str, npt.NDArray[np.float32]], version: int) -> int:
        """Replace all weights; returns the version that the engine now has."""
        return self.engine.load_weights(weights.items(), version)


class TrainedWorker(Worker, ABC):
    """A rank of `actor` or `critic`."""

    training: TrainingConfig
    role = ""
    _store: dist.TCPStore | None = None

    def address(self) -> tuple[str, int]:
        """Open the meeting point of the ranks (rank 0 only); returns host and port."""
        if self.settings.world_size > 1:
            self._store = dist.TCPStore(self.settings.host, 0, self.settings.world_size,
                                        is_master=True, wait_for_workers=False)
            return self.settings.host, self._store.port
        return self.settings.host, 0

    def start(self, address: tuple[str, int]) -> None:
        """Join the other ranks at `address`, load the model and, on resume, the optimizer."""
        settings = self.settings
        if settings.world_size > 1:
            timeout = datetime.timedelta(seconds=self.cfg.deadline_s)
            store = self._store or dist.TCPStore(
                *address, settings.world_size, is_master=False, timeout=timeout)
            dist.init_process_group("nccl" if settings.num_gpus else "gloo", store=store,
                                    rank=settings.rank, world_size=settings.world_size,
                                    timeout=timeout)
        module = self._load_module()
        updates_per_step = self.cfg.epochs * self.cfg.num_minibatches
        self.backend: Backend = make_backend(module, self.training, device=self.device,
                                             total_steps=self._num_steps() * updates_per_step)
        module.eval()                                      # no dropout, whatever the backend set
        if settings.state_path is not None:
            self.backend.load_state(settings.state_path)

    @abstractmethod
    def _load_module(self) -> torch.nn.Module: ...

    def _num_steps(self) -> int:
        return self.cfg.steps

    def _minibatches(self, rollout: Rollout, step: int, epoch: int) -> Iterator[
            tuple[int, list[list[int]]]]:
        """Yield (response tokens of the whole minibatch, this rank's micro-batches)."""
        lengths = rollout.lengths
        for rows in minibatches(len(rollout), self.cfg.num_minibatches, seed=self.settings.seed,
                                step=step, epoch=epoch):
            yield int(rollout.response_lengths[rows].sum()), rank_microbatches(
                lengths=lengths, rows=rows, rank=self.settings.rank,
                world_size=self.settings.world_size,
                tokens_per_microbatch=self.training.tokens_per_microbatch)

    def _reduce(self, sums: dict[str, float]) -> dict[str, float]:
        """Add up over the ranks; every rank has the same names."""
        return dict(zip(sums, self.backend.global_sums(list(sums.values())), strict=True))

    def _state_folder(self, folder: str) -> Path:
        state = Path(folder) / STATE_DIR / self.role
        state.mkdir(parents=True, exist_ok=True)
        return state


class ActorWorker(TrainedWorker):
    """A rank of the policy in training."""

    role = "actor"

    def __init__(self, settings: RoleSettings) -> None:
        super().__init__(settings)
        self.training = settings.ppo.actor
        self.corpus = (PackedRows(settings.corpus_path, "train")
                       if settings.ppo.ptx_coef > 0 else None)

    def _load_module(self) -> torch.nn.Module:
        self.model = CausalLMModel.from_pretrained(self.settings.model_path)
        return self.model

    def _num_steps(self) -> int:
        return max(1, self.cfg.steps - self.cfg.critic_warmup_steps)

    @torch.no_grad()
    def log_probs(self, rollout: Rollout, step: int) -> tuple[Rows, float]:
        """Return (log-probs of the response tokens, sum of entropies) of this rank's rows.

        On the micro-batches of the step's first epoch: there, `update` finds a ratio of exactly 1.
        """
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        indices: list[int] = []
        rows: list[Tensor] = []
        entropy_sum = 0.0
        for _, groups in self._minibatches(rollout, step, epoch=0):
            for group in groups:
                micro = reader.tokens(group).to(self.device)
                log_probs, entropy = self.backend(                                    # (b, T)
                    micro.input_ids, micro.attention_mask, positions=micro.positions,
                    temperature=self.cfg.temperature, with_entropy=True)
                entropy_sum += float((entropy * micro.mask).sum())
                indices += group
                rows += unpadded(log_probs, micro.mask)[: len(group)]
        return (indices, rows), entropy_sum

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """K epochs of clipped-policy SGD; returns token-weighted means over all ranks."""
        reader = RowReader(experience.rollout, pad_id=self.settings.pad_id)
        sums: dict[str, float] = {}
        first: dict[str, float] = {}
        total = number = 0
        for epoch in range(self.cfg.epochs):
            for num_tokens, groups in self._minibatches(experience.rollout, step, epoch):
                largest = 0.0
                for position, group in enumerate(groups):
                    micro = reader.tokens(group).to(self.device)
                    old = reader.floats(experience.old_log_probs, group).to(self.device)
                    advantages = reader.floats(experience.advantages, group).to(self.device)
                    log_probs = response_log_probs(self.backend, micro, self.cfg.temperature)
                    loss_sum, metrics = ppo_policy_loss(                              # (b, T) each
                        log_probs, old, advantages, micro.mask, clip=self.cfg.clip)
                    self.backend.backward(loss_sum, num_tokens, is_last=self.corpus is None
                                          and position == len(groups) - 1)
                    add(sums, metrics)
                    gap = (((log_probs.detach() - old).exp() - 1) * micro.mask).abs().max()
                    largest = max(largest, float(gap))
                if self.corpus is not None:
                    add(sums, self._ptx(self.corpus, step * self._updates + number))
                stats = self.backend.step()                            # clip, AdamW, schedule
                total, number = total + num_tokens, number + 1
                if not first:
                    clipped = self.backend.global_sum(sums["policy/clip_fraction"])
                    first = {"policy/first_ratio": self.backend.global_max(largest),
                             "policy/first_clip_fraction": clipped / num_tokens}
        reduced = self._reduce(sums)
        if "ptx/loss" in reduced:
            reduced["ptx/loss"] *= total / reduced.pop("ptx/num_tokens")
        return {**{name: value / total for name, value in reduced.items()}, **first,
                **{f"policy/{name}": value for name, value in stats.items()}}

    @property
    def _updates(self) -> int:
        return self.cfg.epochs * self.cfg.num_minibatches

    def _ptx(self, corpus: PackedRows, update: int) -> dict[str, Tensor]:
        """Add gamma * the mean loss of pretraining rows: PPO-ptx (InstructGPT eq. 2).

        Its rows, its denominator and its coefficient are its own; temperature plays no part.
        """
        wanted = batch_indices(seed=self.settings.seed, step=update, num_records=len(corpus),
                               batch_size=self.cfg.ptx_batch_size)
        places = list(range(len(wanted)))
        groups = rank_microbatches(
            places, [corpus.row_length] * len(wanted), rank=self.settings.rank,
            world_size=self.settings.world_size,
            tokens_per_microbatch=self.training.tokens_per_microbatch)
        num_tokens = len(wanted) * (corpus.row_length - 1)
        sums: dict[str, Tensor] = {"ptx/loss": torch.zeros(()), "ptx/num_tokens": torch.zeros(())}
        for position, group in enumerate(groups):
            rows = corpus[[wanted[place] for place in group or [0]]].to(self.device)  # (b, S)
            mask = torch.ones_like(rows) if group else torch.zeros_like(rows)
            mask[:, 0] = 0                                             # nothing precedes token 0
            log_probs = self.backend(rows, torch.ones_like(rows))                     # (b, S)
            loss_sum, metrics = negative_log_likelihood(log_probs, mask.float())
            self.backend.backward(self.cfg.ptx_coef * loss_sum, num_tokens,
                                  is_last=position == len(groups) - 1)
            sums["ptx/loss"] += metrics["loss"].cpu()
            sums["ptx/num_tokens"] += mask.sum().cpu()
        return sums

    def weights(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """Return {Hugging Face name: float32 array} of all weights; None but on rank 0."""
        pairs = named_weights(self.model, self.backend.full_weights())
        found = {name: tensor.numpy() for name, tensor in pairs}
        return found if self.settings.rank == 0 else None

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder with the tokenizer (rank 0; the others take part)."""
        weights = dict(self.backend.full_weights())
        if self.settings.rank == 0:
            self.model.save_pretrained(folder, state_dict=weights)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(self.settings.tokenizer_path)
            tokenizer.save_pretrained(folder)

    def save(self, folder: str) -> None:
        """Write the model and the optimizer state into a checkpoint folder that exists."""
        self.export(folder)
        self.backend.save_state(self._state_folder(folder))


class CriticWorker(TrainedWorker):
    """A rank of the value function in training."""

    role = "critic"

    def __init__(self, settings: RoleSettings) -> None:
        super().__init__(settings)
        self.training = settings.ppo.critic

    def _load_module(self) -> torch.nn.Module:
        self.model = ScalarHeadModel.from_pretrained(self.settings.model_path)
        return self.model

    @torch.no_grad()
    def values(self, rollout: Rollout, step: int) -> Rows:
        """Return V of the state before each response token, of this rank's rows."""
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        indices: list[int] = []
        rows: list[Tensor] = []
        for _, groups in self._minibatches(rollout, step, epoch=0):
            for group in groups:
                micro = reader.tokens(group).to(self.device)
                indices += group
                rows += unpadded(self._values(micro), micro.mask)[: len(group)]
        return indices, rows

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """K epochs of clipped-value SGD; returns token-weighted means over all ranks."""
        reader = RowReader(experience.rollout, pad_id=self.settings.pad_id)
        sums: dict[str, float] = {}
        total = 0
        for epoch in range(self.cfg.epochs):
            for num_tokens, groups in self._minibatches(experience.rollout, step, epoch):
                for position, group in enumerate(groups):
                    micro = reader.tokens(group).to(self.device)
                    loss_sum, metrics = ppo_value_loss(                               # (b, T) each
                        self._values(micro),
                        reader.floats(experience.old_values, group).to(self.device),
                        reader.floats(experience.returns, group).to(self.device),
                        micro.mask, clip=self.cfg.value_clip)
                    self.backend.backward(loss_sum, num_tokens,
                                          is_last=position == len(groups) - 1)
                    add(sums, metrics)
                stats = self.backend.step()
                total += num_tokens
        return {**{name: value / total for name, value in self._reduce(sums).items()},
                **{f"critic/{name}": value for name, value in stats.items()}}

    def _values(self, micro: TokenBatch) -> Tensor:
        """Return (b, T): the output at token t - 1 is the value of the state before token t."""
        outputs = self.backend(micro.input_ids, micro.attention_mask)                 # (b, S)
        return values_before(outputs, micro.positions)

    def save(self, folder: str) -> None:
        """Write the model (a folder of its own) and the optimizer state into a checkpoint."""
        state = self._state_folder(folder)
        weights = dict(self.backend.full_weights())
        if self.settings.rank == 0:
            self.model.save_pretrained(str(state), state_dict=weights)
        self.backend.save_state(state)


def response_log_probs(model: Any, micro: TokenBatch, temperature: float) -> Tensor:
    """Return log-probs (b, T) of the response tokens, nats."""
    log_probs: Tensor = model(micro.input_ids, micro.attention_mask, positions=micro.positions,
                              temperature=temperature)
    return log_probs


def unpadded(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the rows of (b, T) without their padding, on the CPU."""
    lengths = mask.sum(dim=1).int().tolist()
    return [row[:length] for row, length in zip(padded.float().cpu(), lengths, strict=True)]


def add(sums: dict[str, float], metrics: dict[str, Tensor]) -> None:
    """Add metrics to `sums`, in place."""
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value)
