"""The roles of PPO: plain classes, one object per process, that know nothing of Ray.

actor      policy in training: log_probs, update, weights
critic     value function in training: values, update
reference  the policy as it was at the start: log_probs
reward     reward models, functions, endpoints: score         in scoring.py
rollout    engine: generate, load_weights                     in rollout.py

All ranks of a trained role call the same method with the same arguments and work on their own part
of the rows (see experience.py). Dropout is off in every role: models stay in eval mode.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rayrlhf.algorithms.losses import (
    kl_loss,
    negative_log_likelihood,
    ppo_policy_loss,
    ppo_value_loss,
)
from rayrlhf.data.datasets import batch_indices, shard
from rayrlhf.data.row_masks import row_masks
from rayrlhf.data.rows import PackedRows
from rayrlhf.models import lora
from rayrlhf.models.causal_lm import CausalLMModel, named_weights
from rayrlhf.models.scalar_head import ScalarHeadModel, values_before
from rayrlhf.rl.buckets import Bucket, packed
from rayrlhf.rl.clock import timed
from rayrlhf.rl.credit import loss_weights
from rayrlhf.rl.experience import (
    Experience,
    Rollout,
    RowReader,
    Rows,
    TokenBatch,
    rank_microbatches,
)
from rayrlhf.rl.ranks import (
    InferenceWorker,
    RoleSettings,
    TrainedWorker,
    add,
    unpadded,
)
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker
from rayrlhf.transfer import Described, Meeting
from rayrlhf.transfer.sender import Sender, free_port

__all__ = ["ActorWorker", "CriticWorker", "ReferenceWorker", "RewardWorker", "RolloutWorker"]


class ReferenceWorker(InferenceWorker):
    """The policy that the KL penalty is measured against; it never changes."""

    def start(self) -> None:
        """Load the model."""
        self.training = self.cfg.actor
        self.model = CausalLMModel.from_pretrained(self.settings.model_path, dtype=self.dtype)
        self.know_flops(self.model)
        self.model.to(self.device).eval()

    @timed
    @torch.no_grad()
    def log_probs(self, rollout: Rollout, step: int) -> Rows:
        """Return log-probs of the response tokens, nats, at the sampling temperature.

        On the very micro-batches of the actor's `log_probs`: with equal weights the KL is 0, in
        bfloat16, too, where the sums of another batch shape round to other numbers.
        """
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        indices: list[int] = []
        rows: list[Tensor] = []
        for group in self._groups(rollout, step):
            micro = reader.tokens(group).to(self.device)
            with self.autocast():
                log_probs = response_log_probs(self.model, micro, self.cfg.temperature)
            self.count(micro)
            indices += micro.indices
            rows += unpadded(log_probs, micro.mask)
        return Rows.of(indices, rows)

    def _groups(self, rollout: Rollout, step: int) -> list[list[int]]:
        """Return this rank's share of the micro-batches of all ranks of the actor."""
        settings, lengths = self.settings, rollout.lengths
        groups = [
            group
            for _, plans in self.plans_of(rollout, step, epoch=0, world_size=settings.actor_ranks)
            for plan in plans
            for group in plan
            if group
        ]
        tokens = [len(group) * max(lengths[row] for row in group) for group in groups]
        mine = shard(range(len(groups)), settings.rank, settings.world_size, tokens)
        return [groups[index] for index in mine]


class ActorWorker(TrainedWorker):
    """A rank of the policy in training."""

    role = "actor"
    _sender: Sender | None = None

    def __init__(self, settings: RoleSettings) -> None:
        super().__init__(settings)
        self.training = settings.ppo.actor
        self.corpus: PackedRows | None = None

    def load_module(self) -> CausalLMModel:
        if self.cfg.ptx_coef > 0:
            self.corpus = PackedRows(self.settings.corpus_path, "train")
        self.model = CausalLMModel.from_pretrained(self.settings.model_path)
        return self.model

    @property
    def first_step(self) -> int:
        return self.cfg.critic_warmup_steps

    @timed
    def log_probs(self, rollout: Rollout, step: int) -> tuple[Rows, float]:
        """Return (log-probs of the response tokens, sum of entropies) of this rank's rows.

        On the micro-batches of the step's first epoch: there, `update` finds a ratio of exactly 1.
        """
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        indices: list[int] = []
        rows: list[Tensor] = []
        entropy_sum = 0.0
        updates = step >= self.cfg.critic_warmup_steps
        for micro, (log_probs, entropy) in self.forward_once(reader, step, updates=updates):
            entropy_sum += float((entropy * micro.mask).sum())
            indices += micro.indices
            rows += unpadded(log_probs, micro.mask)[: len(micro.indices)]
        return Rows.of(indices, rows), entropy_sum

    def outputs(self, micro: TokenBatch, with_metrics: bool) -> tuple[Tensor, Tensor]:
        """Return log-probs and, with_metrics, entropies of the response tokens: (b, T) each."""
        found = self.backend(
            micro.input_ids,
            micro.attention_mask,
            positions=micro.positions,
            temperature=self.cfg.temperature,
            with_entropy=with_metrics,
        )
        return found if with_metrics else (found, torch.zeros_like(found))

    @timed
    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """K epochs of clipped-policy SGD; returns token-weighted means over all ranks.

        Entropy and mismatch are those of the first epoch and minibatch where `log_probs` did not
        find them before, because the old log-probs are the engine's.
        """
        reader = RowReader(experience.rollout, pad_id=self.settings.pad_id)
        self.schedule_from(step)
        sums: dict[str, float] = {}
        first: dict[str, float] = {}
        total = number = 0
        num_responses = len(experience) // self.cfg.num_minibatches
        for epoch in range(self.cfg.epochs):
            is_new = epoch == 0 and self.evaluated != step
            for num_tokens, groups in self.minibatches_of(experience.rollout, step, epoch):
                largest = distance = 0.0
                for position, group in enumerate(groups):
                    micro = reader.tokens(group).to(self.device)
                    old = reader.floats(experience.old_log_probs, group).to(self.device)
                    advantages = reader.floats(experience.advantages, group).to(self.device)
                    log_probs, entropy = self.kept_or_new(micro, step, with_metrics=is_new)
                    weights = loss_weights(self.cfg, micro.mask, num_tokens, num_responses)
                    loss_sum, metrics = ppo_policy_loss(  # (b, T) each
                        log_probs, old, weights * advantages, micro.mask, clip=self.cfg.clip
                    )
                    penalty, more = self._kl_penalty(experience, reader, micro, log_probs, weights)
                    metrics |= more
                    self.count(micro, backward=True)
                    self.backend.backward(
                        loss_sum + penalty,
                        num_tokens,
                        is_last=self.corpus is None and position == len(groups) - 1,
                    )
                    add(sums, metrics)
                    if is_new:
                        found = (entropy * micro.mask).sum() * self.cfg.epochs  # of the first only
                        add(sums, {"policy/entropy": found})
                    log_ratio = (log_probs.detach() - old) * micro.mask
                    changed = (log_ratio.exp() - 1).abs().max().cpu()
                    largest = float(torch.maximum(torch.tensor(largest), changed))  # NaN stays
                    distance += float(log_ratio.abs().sum())
                if self.corpus is not None:
                    add(sums, self._ptx(self.corpus, step * self._updates + number))
                stats = self.backend.step()  # clip, AdamW, schedule
                total, number = total + num_tokens, number + 1
                if not first:
                    clipped = self.backend.global_sum(sums["policy/clip_fraction"])
                    first = {
                        "policy/first_ratio": 1 + self.backend.global_max(largest),
                        "policy/first_clip_fraction": clipped / num_tokens,
                    }
                    if is_new:
                        distance = self.backend.global_sum(distance)
                        first["kl/rollout_mismatch"] = distance / num_tokens
        reduced = self.reduce(sums)
        if "ptx/loss" in reduced:
            reduced["ptx/loss"] *= total / reduced.pop("ptx/num_tokens")
        return {
            **{name: value / total for name, value in reduced.items()},
            **first,
            **{f"policy/{name}": value for name, value in stats.items()},
        }

    def _kl_penalty(
        self,
        experience: Experience,
        reader: RowReader,
        micro: TokenBatch,
        log_probs: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the loss has beside the policy's: 0 where the reward has the KL penalty."""
        if experience.ref_log_probs is None:
            return torch.zeros((), device=self.device), {}
        ref = reader.floats(experience.ref_log_probs, micro.indices).to(self.device)
        loss, metrics = kl_loss(log_probs, ref, micro.mask, weights=weights)
        return experience.kl_coef * loss, metrics

    @property
    def _updates(self) -> int:
        return self.cfg.epochs * self.cfg.num_minibatches

    def _ptx(self, corpus: PackedRows, update: int) -> dict[str, Tensor]:
        """Add gamma * the mean loss of pretraining rows: PPO-ptx (InstructGPT eq. 2).

        Its rows, its denominator and its coefficient are its own; temperature plays no part.
        """
        wanted = batch_indices(
            seed=self.settings.seed,
            step=update,
            num_records=len(corpus),
            batch_size=self.cfg.ptx_batch_size,
        )
        rows = corpus[wanted]  # (n, S)
        attention_mask, loss_mask = row_masks(
            rows, self.settings.eos_id, apart=self.settings.documents_apart
        )
        num_tokens = int(loss_mask.sum())  # of all ranks
        groups = rank_microbatches(
            range(len(wanted)),
            [corpus.row_length] * len(wanted),
            world_size=self.settings.world_size,
            tokens_per_microbatch=self.training.tokens_per_microbatch,
        )[self.settings.rank]
        sums: dict[str, Tensor] = {"ptx/loss": torch.zeros(()), "ptx/num_tokens": torch.zeros(())}
        for position, group in enumerate(groups):
            places = group or [0]
            mask = loss_mask[places].to(self.device)  # (b, S)
            mask &= bool(group)  # an empty one takes part without a loss
            log_probs = self.backend(
                rows[places].to(self.device),
                attention_mask[places].to(self.device),
                positions=mask,
            )  # (b, S)
            loss_sum, metrics = negative_log_likelihood(log_probs, mask)
            self.backend.backward(
                self.cfg.ptx_coef * loss_sum, num_tokens, is_last=position == len(groups) - 1
            )
            sums["ptx/loss"] += metrics["loss"].cpu()
            sums["ptx/num_tokens"] += mask.sum().cpu()
        return sums

    @torch.no_grad()
    def probe(self, rollout: Rollout, temperature: float) -> Rows:
        """Return log-probs of the response tokens of this rank's rows, nats, at any temperature."""
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        indices: list[int] = []
        rows: list[Tensor] = []
        for group in rank_microbatches(
            range(len(rollout)),
            rollout.lengths,
            world_size=self.settings.world_size,
            tokens_per_microbatch=self.training.tokens_per_microbatch,
        )[self.settings.rank]:
            micro = reader.tokens(group).to(self.device)
            log_probs = response_log_probs(self.backend, micro, temperature)
            indices += group
            rows += unpadded(log_probs, micro.mask)[: len(group)]
        return Rows.of(indices, rows)

    def weights(self, dtype: str) -> Iterator[Bucket | None]:
        """Yield what trains, for engines that compute in `dtype`, and None at the end.

        Only rank 0 has buckets; the others take part.
        """
        with self.clock.phase("weights"):
            yield from self._gathered(dtype, frozen=False)
        yield None

    def frozen_weights(self, dtype: str) -> Iterator[Bucket | None]:
        """Yield the like of what training leaves as it is beside its adapters."""
        yield from self._gathered(dtype, frozen=True)
        yield None

    def _gathered(self, dtype: str, *, frozen: bool) -> Iterator[Bucket]:
        """Yield weights as a plain model has them: what an adapter adds is in them."""
        wanted, has_adapter = None, lora.has_adapter(self.model)
        if has_adapter:
            names = {name for name, _ in self.model.named_parameters()}
            wanted = names - lora.adapted(names) if frozen else lora.adapted(names)
        weights = named_weights(self.model, self.backend.full_weights(wanted))
        if self.settings.rank != 0:
            deque(weights, maxlen=0)  # gathering is collective
            return
        if has_adapter:
            weights = lora.merged(self.model.hf, weights)
        yield from packed(weights, dtype)

    def open_transfer(self) -> tuple[str, int]:
        """Return host and port where the engines can meet this rank (rank 0)."""
        return self.settings.host, free_port()

    def join_transfer(self, meeting: Meeting) -> None:
        """Meet the engines in a new group (rank 0; the others have no part in it)."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self.settings.rank == 0:
            self._sender = Sender(meeting, self.device)

    def described(self, dtype: str) -> Described:
        """Return what `send_weights` sends; where weights are sharded, they are gathered for it."""
        found = [(name, tuple(tensor.shape)) for name, tensor in self._whole()]
        names, shapes = zip(*found, strict=True)
        return Described(names, shapes, dtype)

    def send_weights(self, dtype: str) -> None:
        """Send all weights to the engines, as `dtype`; all ranks gather, rank 0 sends."""
        with self.clock.phase("weights"):
            weights = self._whole()
            if self._sender is None:
                deque(weights, maxlen=0)
                return
            kind: torch.dtype = getattr(torch, dtype)
            self._sender.send((name, tensor.to(kind)) for name, tensor in weights)

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.model, self.backend.full_weights(on_device=True))

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
        self.backend.save_state(self.state_folder(folder))


class CriticWorker(TrainedWorker):
    """A rank of the value function in training."""

    role = "critic"

    def __init__(self, settings: RoleSettings) -> None:
        super().__init__(settings)
        self.training = settings.ppo.critic

    def load_module(self) -> ScalarHeadModel:
        if self.settings.zero_head:
            self.model = ScalarHeadModel.from_causal_lm(self.settings.model_path, zero_head=True)
        else:
            self.model = ScalarHeadModel.from_pretrained(self.settings.model_path)
        return self.model

    @timed
    def values(self, rollout: Rollout, step: int) -> Rows:
        """Return V of the state before each response token, of this rank's rows."""
        reader = RowReader(rollout, pad_id=self.settings.pad_id)
        indices: list[int] = []
        rows: list[Tensor] = []
        for micro, values in self.forward_once(reader, step, updates=True):
            indices += micro.indices
            rows += unpadded(values, micro.mask)[: len(micro.indices)]
        return Rows.of(indices, rows)

    @timed
    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """K epochs of clipped-value SGD; returns token-weighted means over all ranks."""
        assert experience.old_values is not None and experience.returns is not None
        reader = RowReader(experience.rollout, pad_id=self.settings.pad_id)
        self.schedule_from(step)
        sums: dict[str, float] = {}
        total = 0
        for epoch in range(self.cfg.epochs):
            for num_tokens, groups in self.minibatches_of(experience.rollout, step, epoch):
                for position, group in enumerate(groups):
                    micro = reader.tokens(group).to(self.device)
                    loss_sum, metrics = ppo_value_loss(  # (b, T) each
                        self.kept_or_new(micro, step, with_metrics=False),
                        reader.floats(experience.old_values, group).to(self.device),
                        reader.floats(experience.returns, group).to(self.device),
                        micro.mask,
                        clip=self.cfg.value_clip,
                    )
                    self.count(micro, backward=True)
                    self.backend.backward(loss_sum, num_tokens, is_last=position == len(groups) - 1)
                    add(sums, metrics)
                stats = self.backend.step()
                total += num_tokens
        return {
            **{name: value / total for name, value in self.reduce(sums).items()},
            **{f"critic/{name}": value for name, value in stats.items()},
        }

    def outputs(self, micro: TokenBatch, with_metrics: bool) -> Tensor:
        """Return (b, T): the output at token t - 1 is the value of the state before token t."""
        outputs = self.backend(micro.input_ids, micro.attention_mask)  # (b, S)
        return values_before(outputs, micro.positions)

    def save(self, folder: str) -> None:
        """Write the model (a folder of its own) and the optimizer state into a checkpoint."""
        state = self.state_folder(folder)
        weights = dict(self.backend.full_weights())
        if self.settings.rank == 0:
            self.model.save_pretrained(str(state), state_dict=weights)
        self.backend.save_state(state)


def response_log_probs(model: Any, micro: TokenBatch, temperature: float) -> Tensor:
    """Return log-probs (b, T) of the response tokens, nats."""
    log_probs: Tensor = model(
        micro.input_ids, micro.attention_mask, positions=micro.positions, temperature=temperature
    )
    return log_probs
