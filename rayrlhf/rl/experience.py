"""What the roles hand to each other: responses without padding, and how a step is cut up.

Shapes, in all of rl/:
    P prompts per step, G samples per prompt, B = P * G responses
    S prompt + response tokens of a padded row, T response tokens of a padded row
    N response tokens of all rows together: "flat" tensors (N,) hold row after row, unpadded
    b rows of a micro-batch

Records cross processes flat. Padding exists inside a micro-batch (`TokenBatch`) and, for the few
per-token floats that the controller works on, as (B, T) with a mask.

How a step's responses are cut into minibatches, ranks and micro-batches is a pure function of
(seed, step, epoch): every rank finds its part without asking, and the old log-probs are computed
on exactly the micro-batches that the first epoch trains on, so its first ratio is exactly 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrlhf.data.datasets import pad, shard
from rayrlhf.data.packing import microbatches
from rayrlhf.generation import Completion

MIN_FILL = 0.9
"""Part of a micro-batch that is not padding, at least. Responses differ in length by a factor of
ten, and a step has few of them: cut by the budget alone, most of a micro-batch would be padding."""


class Record:
    """Pickles tensors as arrays: Ray takes those as they are, and a tensor by way of a file."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value.numpy() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # Ray's arrays are read-only, tensors are not: a copy
            found = torch.tensor(value) if isinstance(value, np.ndarray) else value
            object.__setattr__(self, name, found)


@dataclass(frozen=True)
class Rollout(Record):
    """B responses as the engines sampled them."""

    prompt_ids: Tensor
    """Flat int64, row after row."""
    prompt_lengths: Tensor
    """(B,) int64."""
    response_ids: Tensor
    """(N,) int64."""
    response_lengths: Tensor
    """(B,) int64, all at least 1."""
    log_probs: Tensor
    """(N,) nats, by the engine, at the sampling temperature."""
    truncated: Tensor
    """(B,) bool: the engine stopped for length, by its finish_reason and nothing else."""
    weight_versions: Tensor
    """(B,) int64: version of the weights that generated the row's first token, the oldest."""
    last_versions: Tensor
    """(B,) int64: of its last token; later where new weights came while it was generated."""

    @classmethod
    def from_completions(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
    ) -> "Rollout":
        """Join prompts (token ids) with their completions, row by row."""

        def flat(rows: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([token for row in rows for token in row], dtype=torch.int64)

        return cls(
            prompt_ids=flat(prompts),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_ids=flat([c.token_ids for c in completions]),
            response_lengths=torch.tensor([len(c.token_ids) for c in completions]),
            log_probs=torch.tensor([value for c in completions for value in c.log_probs]),
            truncated=torch.tensor([c.finish_reason == "length" for c in completions]),
            weight_versions=torch.tensor([c.weight_versions[0] for c in completions]),
            last_versions=torch.tensor([c.weight_versions[-1] for c in completions]),
        )

    @classmethod
    def join(cls, parts: Sequence["Rollout"]) -> "Rollout":
        """Put the rows of several rollouts one after the other."""
        return cls(
            **{
                field.name: torch.cat([vars(part)[field.name] for part in parts])
                for field in fields(cls)
            }
        )

    def __len__(self) -> int:
        return len(self.response_lengths)

    @property
    def mask(self) -> Tensor:
        """(B, T) float32: 1 on generated tokens."""
        return length_mask(self.response_lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and response together."""
        lengths: list[int] = (self.prompt_lengths + self.response_lengths).tolist()
        return lengths

    def responses(self) -> list[list[int]]:
        """Return the response ids of each row."""
        return [row.tolist() for row in self.response_ids.split(self.response_lengths.tolist())]


@dataclass(frozen=True)
class Experience(Record):
    """A rollout with what is learned from it; every tensor is flat (N,) float32."""

    rollout: Rollout
    old_log_probs: Tensor
    """log pi_old(token), nats, by the actor."""
    advantages: Tensor
    old_values: Tensor | None = None
    """V(state before the token), by the critic; None where there is none."""
    returns: Tensor | None = None
    """Targets of the critic; None where there is none."""
    ref_log_probs: Tensor | None = None
    """Of the reference, nats; only where the KL penalty is in the loss."""
    kl_coef: float = 0.0
    """Weight of that penalty."""

    def __len__(self) -> int:
        return len(self.rollout)


@dataclass(frozen=True)
class TokenBatch:
    """Rows of a micro-batch, right-padded, at the model's door."""

    indices: list[int]
    """Rows of the rollout; [] for a micro-batch without work, whose mask is 0."""
    input_ids: Tensor
    """(b, S) int64: prompt, response, padding."""
    attention_mask: Tensor
    """(b, S) int64: 1 on prompt and response."""
    positions: Tensor
    """(b, T) int64: column of each response token in input_ids; padding points at a valid one."""
    mask: Tensor
    """(b, T) float32: 1 on generated tokens."""

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the same batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            mask=self.mask.to(device),
            attention_mask=self.attention_mask.to(device),
            positions=self.positions.to(device),
        )


class RowReader:
    """Cut rows out of a rollout's flat tensors and pad them."""

    def __init__(self, rollout: Rollout, *, pad_id: int) -> None:
        self.rollout = rollout
        self.pad_id = pad_id
        self._lengths: list[int] = rollout.response_lengths.tolist()
        self._prompts = rollout.prompt_ids.split(rollout.prompt_lengths.tolist())
        self._responses = rollout.response_ids.split(self._lengths)

    def tokens(self, indices: Sequence[int]) -> TokenBatch:
        """Return the rows `indices`; without any, row 0 with a mask of 0."""
        rows = list(indices) or [0]
        sequences = [torch.cat([self._prompts[i], self._responses[i]]) for i in rows]
        input_ids, attention_mask = pad(sequences, self.pad_id)  # type: ignore[arg-type]
        prompt_lengths = self.rollout.prompt_lengths[rows]  # (b,)
        response_lengths = self.rollout.response_lengths[rows]  # (b,)
        mask = length_mask(response_lengths)  # (b, T)
        positions = prompt_lengths[:, None] + torch.arange(mask.shape[1])
        last = prompt_lengths + response_lengths - 1
        return TokenBatch(
            indices=list(indices),
            input_ids=input_ids,
            attention_mask=attention_mask,
            positions=torch.minimum(positions, last[:, None]),  # (b, T)
            mask=mask if indices else torch.zeros_like(mask),
        )

    def floats(self, flat: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the rows `indices` of a flat (N,) tensor as (b, T), padded with 0."""
        rows = list(indices) or [0]
        parts = flat.split(self._lengths)
        return pad_rows(torch.cat([parts[i] for i in rows]), self.rollout.response_lengths[rows])


@dataclass(frozen=True)
class Rows(Record):
    """Rows of a rollout that a rank worked on, and what it found: indices, one tensor per row.

    They travel as one tensor: pickled one by one, each would take the storage of its micro-batch
    along.
    """

    indices: list[int]
    flat: Tensor
    """The tensors, one after the other."""
    lengths: list[int]

    @classmethod
    def of(cls, indices: list[int], tensors: Sequence[Tensor]) -> "Rows":
        """Take one tensor (n,) per row; their lengths may differ."""
        flat = torch.cat(list(tensors)) if tensors else torch.zeros(0)
        return cls(indices, flat, [len(each) for each in tensors])

    def __iter__(self) -> Iterator[Any]:
        yield self.indices
        yield self.flat.split(self.lengths)


def length_mask(lengths: Tensor) -> Tensor:
    """Return (B, T) float32: 1 on the first `lengths` columns of each row."""
    return (torch.arange(int(lengths.max())) < lengths[:, None]).float()


def pad_rows(flat: Tensor, lengths: Tensor) -> Tensor:
    """Lay a flat (N,) tensor out as (B, T), padded with 0."""
    mask = length_mask(lengths).bool()
    padded = torch.zeros(mask.shape, dtype=flat.dtype)  # (B, T)
    padded[mask] = flat
    return padded


def flatten(padded: Tensor, mask: Tensor) -> Tensor:
    """Return the entries of a (B, T) tensor where `mask` is 1, row after row: (N,)."""
    return padded[mask.bool()]


def scatter_rows(parts: Sequence[Rows]) -> Tensor:
    """Join the rows that the ranks worked on, in order: flat.

    Raises ValueError unless every row is there exactly once.
    """
    rows = {
        index: row
        for indices, tensors in parts
        for index, row in zip(indices, tensors, strict=True)
    }
    count = sum(len(part.indices) for part in parts)
    if count != len(rows) or sorted(rows) != list(range(count)):
        raise ValueError(
            f"the ranks returned {count} rows, {len(rows)} of them different: every "
            "row must come back exactly once"
        )
    return torch.cat([rows[index] for index in range(count)])


def minibatches(
    num_responses: int, num_minibatches: int, *, seed: int, step: int, epoch: int
) -> list[list[int]]:
    """Return the rows of each minibatch of one epoch: a permutation cut into equal parts."""
    order = np.random.default_rng([seed, step, epoch]).permutation(num_responses)
    return [part.tolist() for part in np.split(order, num_minibatches)]


def rank_microbatches(
    rows: Sequence[int], lengths: Sequence[int], *, world_size: int, tokens_per_microbatch: int
) -> list[list[list[int]]]:
    """Return the micro-batches of each rank for `rows`, whose tokens `lengths[row]` counts.

    Rows are dealt to the ranks by their length, sorted, and cut by the token budget. Every rank
    gets the same number of micro-batches, because a forward may be collective (ZeRO-3): one with
    less to do gets empty ones at the end.
    """
    plans = []
    for each in range(world_size):
        mine = shard(rows, each, world_size, [lengths[row] for row in rows])
        cut = microbatches([lengths[row] for row in mine], tokens_per_microbatch, min_fill=MIN_FILL)
        plans.append([[mine[position] for position in group] for group in cut])
    longest = max(len(plan) for plan in plans)
    return [plan + [[] for _ in range(longest - len(plan))] for plan in plans]
