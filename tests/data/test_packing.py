"""Packing accounts for every token; micro-batches hold every sequence once within the budget."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.packing import (
    STRETCH,
    even_parts,
    microbatches,
    pack,
    pack_best_fit,
    pack_tight,
    pack_whole,
    within_budget,
)

EOS = 0


def test_rows_by_hand() -> None:
    rows, tail = pack([[1, 2, 3], [4], [], [5, 6]], row_length=4, eos_id=EOS)
    # stream: 1 2 3 0 | 4 0 0 5 | 6 0
    assert rows.tolist() == [[1, 2, 3, 0], [4, 0, 0, 5]]
    assert tail == 2
    assert rows.dtype == np.int32


def test_nothing_to_pack() -> None:
    rows, tail = pack([], row_length=8, eos_id=EOS)
    assert rows.shape == (0, 8)
    assert tail == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=12), max_size=20), st.integers(1, 9))
def test_every_token_is_accounted_for_and_in_order(documents: list[list[int]], length: int) -> None:
    rows, tail = pack(documents, row_length=length, eos_id=EOS)
    stream = [token for document in documents for token in [*document, EOS]]
    assert sum(map(len, documents)) + len(documents) == rows.size + tail
    assert tail < length
    assert rows.reshape(-1).tolist() == stream[: rows.size]


def test_best_fit_by_hand() -> None:
    documents = [[1, 1, 1], [2] * 6, [3], [4, 4, 4, 4, 4]]
    rows, filling = pack_best_fit(documents, row_length=5, eos_id=EOS)
    # With their end: 4, 7 = 5 + 2, 2, 6 = 5 + 1 tokens; the last one's rest is its end alone.
    assert rows.tolist() == [
        [2, 2, 2, 2, 2],
        [4, 4, 4, 4, 4],
        [1, 1, 1, EOS, EOS],
        [2, EOS, 3, EOS, EOS],
    ]
    assert filling == 1
    assert rows.dtype == np.int32


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=12), max_size=30), st.integers(1, 9))
def test_best_fit_keeps_documents_whole(documents: list[list[int]], length: int) -> None:
    rows, filling = pack_best_fit(documents, row_length=length, eos_id=EOS)
    assert sum(map(len, documents)) + len(documents) + filling == rows.size
    text = [" ".join(map(str, row)) + " " for row in rows.tolist()]
    for document in documents:
        if len(document) < length:
            wanted = "".join(f"{token} " for token in [*document, EOS])
            assert any(wanted in row for row in text)


def test_best_fit_wastes_little() -> None:
    rng = np.random.default_rng(0)
    documents = [[1] * int(n) for n in rng.lognormal(3.5, 1, 3000).clip(1, 2000)]
    rows, filling = pack_best_fit(documents, row_length=256, eos_id=EOS)
    assert filling / rows.size < 0.005


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100), st.floats(0, 1))
def test_microbatches_hold_everything_once_within_the_budget(
    lengths: list[int], budget: int, min_fill: float
) -> None:
    groups = microbatches(lengths, budget, min_fill=min_fill)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
        filled = sum(lengths[i] for i in group)
        assert filled >= min_fill * len(group) * max(lengths[i] for i in group)
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


def test_microbatches_by_hand() -> None:
    lengths = [10, 9, 6, 4, 1]
    assert microbatches(lengths, 100) == [[0, 1, 2, 3, 4]]
    assert microbatches(lengths, 20) == [[0, 1], [2, 3, 4]]
    # 29 of 40 tokens are more than 0.7 of them, 30 of 50 are not
    assert microbatches(lengths, 100, min_fill=0.7) == [[0, 1, 2, 3], [4]]


def test_whole_sequences_fill_rows_by_hand() -> None:
    # rows of 7: 7 | 4 + 3 | 4 + 2
    assert pack_whole([4, 3, 7, 2, 4]) == [[2], [0, 1], [4, 3]]
    assert pack_whole([9, 1], row_length=4) == [[0], [1]]
    assert pack_whole([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100))
def test_whole_sequences_occur_once_and_fit(lengths: list[int], row_length: int) -> None:
    rows = pack_whole(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= row_length
    assert within_budget(lengths, row_length) == rows


def test_tight_rows_by_hand() -> None:
    # In rows of 4, each 3 has a gap: 4 rows, 16 tokens. In rows of 6 there is 4, and 3 + 3: 12.
    assert pack_whole([3, 3, 3, 4]) == [[3], [0], [1], [2]]
    assert pack_tight([3, 3, 3, 3, 4, 2], 100) == [[4, 5], [0, 1], [2, 3]]
    assert pack_tight([3, 3, 3, 3, 4, 2], 4) == pack_whole([3, 3, 3, 3, 4, 2])  # the budget
    assert pack_tight([5, 5], 100) == [[0], [1]]
    assert pack_tight([], 100) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 100))
def test_tight_rows_hold_everything_once_and_pad_no_more(lengths: list[int], budget: int) -> None:
    rows, plain = pack_tight(lengths, budget), pack_whole(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    width = max(sum(lengths[i] for i in row) for row in rows)
    assert width <= max(max(lengths), min(budget, round(STRETCH * max(lengths))))
    assert len(rows) * width <= len(plain) * max(lengths)


def test_tight_rows_waste_little() -> None:
    rng = np.random.default_rng(0)
    tokens = padded = 0
    for _ in range(20):
        lengths = [int(n) for n in rng.lognormal(3.2, 0.5, 32).clip(5, 90)]
        rows = pack_tight(lengths, 1024)
        tokens += sum(lengths)
        padded += len(rows) * max(sum(lengths[i] for i in row) for row in rows)
    assert 1 - tokens / padded < 0.05


def test_even_parts_by_hand() -> None:
    assert even_parts(23, 21) == [range(11), range(11, 23)]
    assert even_parts(4, 2) == [range(2), range(2, 4)]
    assert even_parts(0, 3) == []
