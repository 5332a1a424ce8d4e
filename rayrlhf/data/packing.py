"""Pure packing: documents to rows of T tokens, sequences to rows and micro-batches.

A corpus's rows (`pack`) have no padding, and attention is not reset at a document's end: documents
follow each other with one end-of-text token between them, and a row may start inside a document.
Demonstrations and responses stay whole (`pack_whole`), and those of a row do not see each other.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


def pack(
    documents: Iterable[Sequence[int]], row_length: int, eos_id: int
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


def microbatches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group the positions of `lengths` so that (count * longest) stays within the budget.

    Longest first, so that running out of memory shows at once; every position occurs exactly
    once. A sequence that is longer than the budget stands alone.
    """
    groups: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * longest <= tokens_per_microbatch:
            groups[-1].append(position)
        else:
            groups.append([position])
            longest = lengths[position]
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


def within_budget(tokens: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group positions so that the sum of their `tokens` stays within the budget.

    Largest first; every position occurs exactly once, and one over the budget stands alone.
    """
    return pack_whole(tokens, tokens_per_microbatch)
