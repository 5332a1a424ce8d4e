"""Comparison records in and out: what to judge from a file, and what people said as one.

An exported record is what `reward.train` and `dpo.train` read: `ranks` from the mean of all people,
`single_ratings` with what each of them said. A person's rating of a response is K + 1 - its rank,
where tied responses share the mean of the ranks that they take: 1 (worst) to K (best). There are no
`ratings`, which would compare responses to different prompts.
"""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrlhf.config import LabelConfig
from rayrlhf.data.records import Record
from rayrlhf.data.storage import replacing
from rayrlhf.serving.store import Store

Floats = npt.NDArray[np.float64]
FILE = "comparisons.jsonl"
VOTES = {"a": [1, 2], "b": [2, 1], "tie": [1, 1], "bad": [1, 1]}
"""Ranks of the two answers of a battle."""


def wanted_people(num_items: int, cfg: LabelConfig) -> list[int]:
    """Return how many people should judge each item.

    `cfg.overlap` of the items, spread evenly, want `cfg.overlap_labellers`; the others one. The
    first item is one of the former, so that agreement shows early.
    """
    ends = [math.ceil(i * cfg.overlap) for i in range(num_items + 1)]
    return [cfg.overlap_labellers if end > start else 1 for start, end in pairwise(ends)]


def mid_ranks(ranks: Sequence[int]) -> Floats:
    """Return ranks (K,) of which tied ones share the mean of the ranks that they take."""
    values = np.asarray(ranks)
    below = (values[None, :] < values[:, None]).sum(axis=1)
    equal = (values[None, :] == values[:, None]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2, dtype=np.float64)


def dense_ranks(ratings: Floats) -> list[int]:
    """Return 1 for the highest rating, 2 for the next lower one, and so on; equal ones tie."""
    rounded = np.round(ratings, 9)
    levels = -np.unique(-rounded)
    return [int(np.flatnonzero(levels == value)[0]) + 1 for value in rounded]


def ranked_records(store: Store) -> list[Record]:
    """Return a comparison record per item that anybody ranked, in the order of the file."""
    ranked = [row for row in store.rankings() if row.ranks is not None]
    return [_record(list(rows)) for _, rows in groupby(ranked, key=lambda row: row.item)]


def _record(rows: list[Any]) -> Record:
    first = rows[0]
    num = len(first.responses)
    single = np.stack([num + 1 - mid_ranks(row.ranks) for row in rows], axis=1)  # (K, people)
    mean = single.mean(axis=1)
    return {
        # An item that was exported before says what people said then, perhaps with `ratings`.
        **{key: value for key, value in first.extra.items() if key != "ratings"},
        "prompt": first.prompt,
        "responses": first.responses,
        "ranks": dense_ranks(mean),
        "single_ratings": [[float(value) for value in row] for row in single],
        "labellers": [row.labeller for row in rows],
        "single_ranks": [row.ranks for row in rows],
        "flags": [sorted(code for row in rows for code in row.flags[k]) for k in range(num)],
        "notes": [row.note for row in rows],
    }


def voted_records(store: Store) -> list[Record]:
    """Return a comparison record of K = 2 per vote of the arena, in the order of the votes."""
    return [
        {
            "prompt": row.prompt,
            "responses": row.responses,
            "ranks": VOTES[row.vote],
            "single_ratings": [[float(3 - rank)] for rank in mid_ranks(VOTES[row.vote])],
            "labellers": [row.labeller],
            "models": row.models,
            "vote": row.vote,
            **({"messages": row.messages} if row.messages else {}),
        }
        for row in store.votes()
        if all(row.responses)
    ]


def lines(records: Iterable[Record]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(path: Path, records: Sequence[Record]) -> None:
    """Write records to a file, which is whole on disk or not there."""
    with replacing(path) as new:
        new.write_text(lines(records), encoding="utf-8")
