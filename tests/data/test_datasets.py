"""Records to token ids, batches as a pure function of the step."""

from collections import Counter
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import RecipeError
from rayrlhf.data.datasets import (
    batch_indices,
    encode_comparisons,
    encode_demonstrations,
    encode_prompts,
    fitting_prompts,
    pad,
    shard,
)
from rayrlhf.data.tokenizer import encode_text, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(["the movie is good"] * 9), 280)


def test_demonstration_has_loss_on_the_response_and_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    records = [
        {"prompt": "Tweet: the", "response": " movie"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}]},
    ]
    plain, chat = encode_demonstrations(records, tokenizer, max_length=64)
    spoken = [[i for i, m in zip(e.ids, e.mask, strict=True) if m] for e in (plain, chat)]
    assert tokenizer.decode(plain.ids) == "Tweet: the movie<|endoftext|>"
    assert [tokenizer.decode(s) for s in spoken] == [" movie<|endoftext|>", "good<|endoftext|>"]
    assert (plain.record, chat.record) == (0, 1)


def test_too_long_demonstrations_are_dropped_with_a_line(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": "a", "response": "b" * 50}, {"prompt": "a", "response": "b"}]
    assert [e.record for e in encode_demonstrations(records, tokenizer, 10)] == [1]
    assert "1 of 2 demonstrations are longer than 10 tokens" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="none of 2 demonstrations fits into 2 tokens"):
        encode_demonstrations(records, tokenizer, 2)


def test_comparison_keeps_what_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {"prompt": "a", "responses": ["b" * 50, "c", "d"], "ranks": [1, 3, 2]},
        {"prompt": "a", "responses": ["b" * 50, "c"], "ranks": [1, 2]},
    ]
    (only,) = encode_comparisons(records, tokenizer, 10)
    assert (only.record, only.kept, only.ranks) == (0, [1, 2], [3, 2])
    assert only.prompt_length == len(encode_text(tokenizer, "a"))
    eos = tokenizer.eos_token_id
    assert only.ids == [
        [*encode_text(tokenizer, "a"), *encode_text(tokenizer, t), eos] for t in "cd"
    ]


def test_comparison_of_a_chat_begins_as_the_policy_sees_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    record = {"messages": messages, "prompt": "hi", "responses": ["a", "b"], "ranks": [1, 2]}
    (found,) = encode_comparisons([record], tokenizer, 60)
    (prompt,) = encode_prompts([{"messages": messages}], tokenizer, 60)
    assert found.prompt_length == len(prompt)
    eos = tokenizer.eos_token_id
    assert found.ids == [[*prompt, *encode_text(tokenizer, text), eos] for text in "ab"]
    assert tokenizer.decode(found.ids[0]) == "<|user|>hi<|end|><|assistant|>a<|endoftext|>"


def test_prompts_stay_aligned_with_their_records(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        {"prompt": "a" * 30},
        {"prompt": "ab"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    with pytest.raises(RecipeError, match="prompt 1 has 30 tokens, but only 9 fit"):
        encode_prompts(records, tokenizer, 9)
    kept = fitting_prompts(records, tokenizer, 9)
    assert kept == records[1:]
    ids = encode_prompts(kept, tokenizer, 9)
    assert [tokenizer.decode(i) for i in ids] == ["ab", "<|user|>hi<|end|><|assistant|>"]


def test_every_record_once_per_epoch_none_dropped() -> None:
    order = [
        i
        for step in range(9)
        for i in batch_indices(seed=3, step=step, batch_size=7, num_records=21)
    ]
    epochs = [order[e * 21 : (e + 1) * 21] for e in range(3)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_cross_epochs_and_are_a_function_of_the_step() -> None:
    batches = [batch_indices(seed=0, step=s, batch_size=4, num_records=10) for s in range(5)]
    assert Counter(i for b in batches for i in b) == dict.fromkeys(range(10), 2)
    assert batch_indices(seed=0, step=3, batch_size=4, num_records=10) == batches[3]
    assert batch_indices(seed=1, step=3, batch_size=4, num_records=10) != batches[3]
    assert len(batch_indices(seed=0, step=0, batch_size=25, num_records=10)) == 25


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_partition_the_batch_and_balance_it(world_size: int) -> None:
    indices = [5, 3, 8, 1, 9]
    weights = [100.0, 1, 50, 49, 2]
    parts = [shard(indices, rank, world_size, weights) for rank in range(world_size)]
    assert sorted(i for part in parts for i in part) == sorted(indices)
    cost = dict(zip(indices, weights, strict=True))
    loads = [sum(cost[i] for i in part) for part in parts]
    assert max(loads) <= max(100.0, sum(weights) / world_size * 4 / 3)
    assert shard(indices, 0, 1) == indices


def test_padding_is_marked_by_length_even_if_pad_is_eos() -> None:
    ids, mask = pad([[1, 0], [2, 3, 0]], pad_id=0)
    assert ids.tolist() == [[1, 0, 0], [2, 3, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64
    assert pad([], 0)[0].shape == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    num_records=st.integers(1, 60),
    batch_size=st.integers(1, 17),
    world_size=st.integers(1, 7),
    step=st.integers(0, 40),
    seed=st.integers(0, 3),
    weighted=st.booleans(),
)
def test_any_number_of_workers_reads_the_rows_of_the_step(
    num_records: int, batch_size: int, world_size: int, step: int, seed: int, weighted: bool
) -> None:
    wanted = batch_indices(seed=seed, step=step, batch_size=batch_size, num_records=num_records)
    costs = [float(1 + index % 5) for index in wanted] if weighted else None
    parts = [shard(wanted, rank, world_size, costs) for rank in range(world_size)]
    assert sorted(index for part in parts for index in part) == sorted(wanted)
    assert max(map(len, parts)) - min(map(len, parts)) <= (batch_size if weighted else 1)
    for part in parts:  # each rank keeps the order of the batch
        places = iter(wanted)
        assert all(index in places for index in part)


@settings(max_examples=40, deadline=None)
@given(
    num_records=st.integers(1, 60), batch_size=st.integers(1, 17), stops=st.lists(st.integers(1, 9))
)
def test_a_run_that_stops_anywhere_reads_on_as_if_it_had_not(
    num_records: int, batch_size: int, stops: list[int]
) -> None:
    def rows(first: int, last: int) -> list[int]:
        return [
            index
            for step in range(first, last)
            for index in batch_indices(
                seed=1, step=step, batch_size=batch_size, num_records=num_records
            )
        ]

    ends = [0, *accumulate(stops)]
    pieces = [rows(first, last) for first, last in pairwise(ends)]
    whole = rows(0, ends[-1])
    assert sum(pieces, []) == whole
    epochs = len(whole) // num_records
    for epoch in range(epochs):
        one = whole[epoch * num_records : (epoch + 1) * num_records]
        assert sorted(one) == list(range(num_records))
