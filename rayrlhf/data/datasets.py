"""Demonstrations, comparisons and prompts: records -> token ids -> batches.

The order of training data is a pure function of (seed, step): no iterator has a state that a
checkpoint would have to store.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf import console
from rayrlhf.config import RecipeError
from rayrlhf.data.chat import encode_chat
from rayrlhf.data.records import Kind, Record, iter_records, read_records
from rayrlhf.data.tokenizer import encode_text

__all__ = [
    "Comparison",
    "Example",
    "Kind",
    "Record",
    "batch_indices",
    "encode_comparisons",
    "encode_demonstrations",
    "encode_prompts",
    "fitting_prompts",
    "iter_records",
    "lay_out",
    "number_documents",
    "pad",
    "read_records",
    "records_between",
    "shard",
]


@dataclass(frozen=True)
class Example:
    """A demonstration as token ids."""

    ids: list[int]
    """Prompt, response and end-of-text."""
    mask: list[int]
    """1 on the tokens that carry loss (response and end-of-text), else 0."""
    record: int
    """Position of the record that it comes from."""


@dataclass(frozen=True)
class Comparison:
    """K ranked responses to one prompt as token ids."""

    ids: list[list[int]]
    """Per response: prompt, response and end-of-text."""
    ranks: list[int]
    """Per response: 1 = best, ties allowed."""
    record: int
    """Position of the record that it comes from."""
    kept: list[int]
    """Positions of the responses within the record (those that are too long are left out)."""
    prompt_length: int
    """Tokens of the prompt, with which each of `ids` begins."""
    ratings: list[float] = field(default_factory=list)
    """Per response: its mean rating, higher is better; [] where the record has none."""
    single_ratings: list[list[float]] = field(default_factory=list)
    """Per response: the rating of each person; [] where the record has none."""


def encode_demonstrations(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Example]:
    """Tokenize demonstrations; those over `max_length` tokens are dropped, with one line.

    Raises RecipeError when none is left.
    """
    found = [
        encode_demonstration(record, tokenizer, max_length, index)
        for index, record in enumerate(records)
    ]
    examples = [example for example in found if example is not None]
    _report_dropped("demonstrations", len(records) - len(examples), len(records), max_length)
    return examples


def encode_demonstration(
    record: Record, tokenizer: PreTrainedTokenizerFast, max_length: int, index: int = 0
) -> Example | None:
    """Tokenize a demonstration; None when it is longer than `max_length` tokens."""
    eos = _eos(tokenizer)
    if "messages" in record:
        ids, mask = encode_chat(tokenizer, record["messages"])
    else:
        prompt = encode_text(tokenizer, record["prompt"])
        response = encode_text(tokenizer, record["response"])
        ids, mask = prompt + response, [0] * len(prompt) + [1] * len(response)
    # What a chat template adds after the last answer is never generated.
    while mask and not mask[-1]:
        ids, mask = ids[:-1], mask[:-1]
    if ids[-1] != eos:
        ids, mask = [*ids, eos], [*mask, 1]
    return Example(ids, mask, index) if len(ids) <= max_length else None


def encode_comparisons(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Comparison]:
    """Tokenize comparisons; responses over `max_length` tokens (prompt included) are left out.

    A comparison with fewer than two responses left is dropped, with one line. Raises RecipeError
    when none is left.
    """
    found = [
        encode_comparison(record, tokenizer, max_length, index)
        for index, record in enumerate(records)
    ]
    comparisons = [comparison for comparison in found if comparison is not None]
    _report_dropped("comparisons", len(records) - len(comparisons), len(records), max_length)
    return comparisons


def encode_comparison(
    record: Record, tokenizer: PreTrainedTokenizerFast, max_length: int, index: int = 0
) -> Comparison | None:
    """Tokenize a comparison; None when fewer than two responses fit into `max_length` tokens."""
    eos = _eos(tokenizer)
    prompt = encode_prompt(record, tokenizer)
    ids = [[*prompt, *encode_text(tokenizer, text), eos] for text in record["responses"]]
    kept = [k for k, sequence in enumerate(ids) if len(sequence) <= max_length]
    if len(kept) < 2:
        return None
    ratings, single = record.get("ratings"), record.get("single_ratings")
    return Comparison(
        [ids[k] for k in kept],
        [record["ranks"][k] for k in kept],
        index,
        kept,
        len(prompt),
        [] if ratings is None else [float(ratings[k]) for k in kept],
        [] if single is None else [[float(value) for value in single[k]] for k in kept],
    )


def encode_prompts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, max_prompt_tokens: int
) -> list[list[int]]:
    """Tokenize prompts, one list of ids per record; `messages` end where the answer begins.

    Raises RecipeError when one is longer than `max_prompt_tokens`: see `fitting_prompts`.
    """
    prompts = []
    for index, record in enumerate(records):
        ids = encode_prompt(record, tokenizer)
        if len(ids) > max_prompt_tokens:
            raise RecipeError(
                f"prompt {index + 1} has {len(ids)} tokens, but only {max_prompt_tokens} fit "
                "before the response: remove it, raise model.max_length, or lower "
                "max_response_tokens"
            )
        prompts.append(ids)
    return prompts


def fitting_prompts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, max_prompt_tokens: int
) -> list[Record]:
    """Return the records whose prompt has at most `max_prompt_tokens`, and say how many do not.

    Raises RecipeError when none fits.
    """
    kept = [r for r in records if len(encode_prompt(r, tokenizer)) <= max_prompt_tokens]
    _report_dropped("prompts", len(records) - len(kept), len(records), max_prompt_tokens)
    return kept


def batch_indices(*, seed: int, step: int, batch_size: int, num_records: int) -> list[int]:
    """Return the records of step `step` (from 0) where every batch has `batch_size` of them."""
    start = step * batch_size
    return records_between(start, start + batch_size, seed=seed, num_records=num_records)


def records_between(start: int, stop: int, *, seed: int, num_records: int) -> list[int]:
    """Return the records at these positions of the order: a pure function of its arguments.

    The order is one permutation per epoch, end to end: every record occurs once per epoch and
    none is dropped; a batch may hold the end of one epoch and the beginning of the next.
    """
    return [
        int(_permutation(seed, position // num_records, num_records)[position % num_records])
        for position in range(start, stop)
    ]


def shard(
    indices: Sequence[int], rank: int, world_size: int, weights: Sequence[float] | None = None
) -> list[int]:
    """Return the part of a step's batch that `rank` works on, in the order of the batch.

    `weights` are costs aligned with `indices` (for example tokens); the heaviest goes first to
    the rank with the least so far. Over all ranks every entry occurs exactly once.
    """
    if weights is None:
        return list(indices[rank::world_size])
    loads = [(0.0, 0, each) for each in range(world_size)]  # (cost, count, rank): a heap
    mine = []
    for position in sorted(range(len(indices)), key=lambda i: (-weights[i], i)):
        cost, count, target = loads[0]
        heapq.heapreplace(loads, (cost + weights[position], count + 1, target))
        if target == rank:
            mine.append(position)
    return [indices[position] for position in sorted(mine)]


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad to the longest; returns input_ids (b, S) and attention_mask (b, S), both int64.

    The mask comes from the lengths, never from comparing ids with `pad_id`.
    """
    longest = max((len(s) for s in sequences), default=0)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)  # (b, S)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)  # (b, S)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask


def lay_out(rows: Sequence[Sequence[Sequence[int]]], fill: int) -> torch.Tensor:
    """Join the sequences of each row and right-pad with `fill`: (b, S) int64."""
    joined = [[value for sequence in row for value in sequence] for row in rows]
    return pad(joined, fill)[0]


def number_documents(rows: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """Return the attention mask (b, S) int64 of `lay_out`: 1, 2, ... by sequence, 0 on padding."""
    return lay_out(
        [[[number] * len(sequence) for number, sequence in enumerate(row, 1)] for row in rows], 0
    )


def encode_prompt(record: Record, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokenize a prompt; `messages` end where the answer begins."""
    if "messages" not in record:
        return encode_text(tokenizer, record["prompt"])
    return encode_chat(tokenizer, record["messages"], open_answer=True)[0]


def _eos(tokenizer: PreTrainedTokenizerFast) -> int:
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "the tokenizer has no end-of-text token: set eos_token in its "
            "tokenizer_config.json, or choose another tokenizer.path"
        )
    return int(tokenizer.eos_token_id)


def _report_dropped(what: str, dropped: int, total: int, limit: int) -> None:
    if dropped == total:
        raise RecipeError(
            f"none of {total} {what} fits into {limit} tokens: raise "
            "model.max_length or shorten the texts"
        )
    if dropped:
        console.say(f"data: {dropped} of {total} {what} are longer than {limit} tokens: left out")


@lru_cache(maxsize=2)  # of a large corpus it takes 4 bytes per row
def _permutation(seed: int, epoch: int, num_records: int) -> npt.NDArray[np.integer]:
    order = np.random.default_rng([seed, epoch]).permutation(num_records)
    return order.astype(np.uint32) if num_records < 2**32 else order
