"""Pure packing: documents to rows of T tokens, sequences to rows and micro-batches.

A corpus's rows hold documents with one end-of-text token after each: those of `pack` have no
padding, and a row may start inside a document; those of `pack_best_fit` keep documents whole.
Demonstrations and responses stay whole (`pack_whole`), and those of a row do not see each other.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

STRETCH = 1.5
"""Longest row over longest sequence. On the built-in demonstrations, 32 a step, padding is 13% of
the tokens at 1, 3% at 1.5 and at 2; a row's masked attention costs the square of its length."""


def pack(
    documents: Iterable[npt.ArrayLike], row_length: int, eos_id: int
) -> tuple[npt.NDArray[np.int32], int]:
    """Join documents, each followed by `eos_id`, and cut the stream into rows.

    Returns (rows (n, T) int32, number of tokens in the unfinished last row, which are dropped);
    sum of document lengths + number of documents = n * T + dropped.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    eos = np.array([eos_id], dtype=np.int32)
    for document in documents:
        pieces += [np.asarray(document, dtype=np.int32), eos]
    stream = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    num_rows, dropped = divmod(len(stream), row_length)
    return stream[: num_rows * row_length].reshape(num_rows, row_length), dropped


def pack_best_fit(
    documents: Iterable[npt.ArrayLike], row_length: int, eos_id: int
) -> tuple[npt.NDArray[np.int32], int]:
    """Put documents, each followed by `eos_id`, whole into rows, and fill these up with `eos_id`.

    Longest first into the row with the least room that is enough (best-fit decreasing,
    arXiv:2404.10830); only a document that is longer than a row is cut, into rows of its own and
    a rest. Returns (rows (n, T) int32, number of filling tokens); sum of document lengths +
    number of documents + filling = n * T.
    """
    eos = np.array([eos_id], dtype=np.int32)
    chunks: list[npt.NDArray[np.int32]] = []
    for document in documents:
        ended = np.concatenate([np.asarray(document, dtype=np.int32), eos])
        chunks += [ended[start : start + row_length] for start in range(0, len(ended), row_length)]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by the room that they have left
    rooms: list[int] = []  # the keys, sorted
    for position in sorted(range(len(chunks)), key=lambda i: (-len(chunks[i]), i)):
        length = len(chunks[position])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), row_length
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(position)
        if left := room - length:
            if left not in open_rows:
                insort(rooms, left)
            open_rows.setdefault(left, []).append(row)
    packed = np.full((len(rows), row_length), eos_id, dtype=np.int32)
    for number, row_chunks in enumerate(rows):
        joined = np.concatenate([chunks[position] for position in row_chunks])
        packed[number, : len(joined)] = joined
    return packed, int(packed.size) - sum(len(chunk) for chunk in chunks)


def microbatches(
    lengths: Sequence[int], tokens_per_microbatch: int, *, min_fill: float = 0.0
) -> list[list[int]]:
    """Group the positions of `lengths` so that (count * longest) stays within the budget.

    Longest first, so that running out of memory shows at once; every position occurs exactly
    once. A sequence that is longer than the budget stands alone. At least `min_fill` (0 to 1) of a
    group is not padding.
    """
    groups: list[list[int]] = []
    longest = filled = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = (len(groups[-1]) + 1) * longest if groups else 0
        filled += lengths[position]
        if groups and size <= tokens_per_microbatch and filled >= min_fill * size:
            groups[-1].append(position)
        else:
            groups.append([position])
            longest = filled = lengths[position]
    return groups


def pack_whole(lengths: Sequence[int], row_length: int | None = None) -> list[list[int]]:
    """Put sequences, whole, into rows of at most `row_length` tokens; return their positions.

    First fit, longest first, which wastes little where lengths differ. None takes the longest
    sequence, and one that is longer than a row has a row of its own. Every position occurs once.
    """
    if row_length is None:
        row_length = max(lengths, default=0)
    rows: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        row = next((r for r, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(position)
        room[row] -= length
    return rows


def pack_tight(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Put sequences, whole, into rows as long as pads least; return their positions.

    Rows that are as long as the longest sequence end in gaps too short for any other. So up to
    STRETCH times that are tried, within the budget: the padding is that of rows cut to the fullest
    of them. Of equals the shorter rows win, whose attention costs less.
    """
    longest = max(lengths, default=0)
    most = max(longest, min(round(STRETCH * longest), tokens_per_microbatch))
    lengths_tried = sorted({longest + (most - longest) * i // 15 for i in range(16)})

    def padded(rows: list[list[int]]) -> int:
        return len(rows) * max((sum(lengths[i] for i in row) for row in rows), default=0)

    # min keeps the first of equals.
    return min((pack_whole(lengths, length) for length in lengths_tried), key=padded)


def even_parts(count: int, largest: int) -> list[range]:
    """Cut `count` items into the fewest parts of at most `largest`, of sizes that differ by 1."""
    num = -(-count // largest)
    return [range(count * i // num, count * (i + 1) // num) for i in range(num)]


def within_budget(tokens: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group positions so that the sum of their `tokens` stays within the budget.

    Largest first; every position occurs exactly once, and one over the budget stands alone.
    """
    return pack_whole(tokens, tokens_per_microbatch)
