"""How far people are, how well they agree, and how the models of the arena do."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rayrlhf.evaluation.agreement import krippendorff_alpha, order_agreement
from rayrlhf.serving.exchange import mid_ranks
from rayrlhf.serving.store import Store


def status(store: Store, labellers: Sequence[str], *, arena: bool) -> dict[str, Any]:
    """Return what the status page shows, as plain data."""
    rankings, votes = store.rankings(), store.votes()
    progress = store.progress()
    names = list(dict.fromkeys([*labellers, *sorted({row.labeller for row in rankings + votes})]))
    return {
        "queue": {
            "items": progress.num_items,
            "wanted": progress.wanted,
            "done": progress.done,
        },
        "labellers": [_person(name, rankings, votes) for name in names],
        "agreement": agreement(rankings),
        "arena": models(votes) if arena or votes else None,
    }


def _person(name: str, rankings: Sequence[Any], votes: Sequence[Any]) -> dict[str, Any]:
    mine = [row for row in rankings if row.labeller == name]
    ranked = [row.seconds for row in mine if row.ranks is not None]
    return {
        "name": name,
        "ranked": len(ranked),
        "skipped": len(mine) - len(ranked),
        "votes": sum(row.labeller == name for row in votes),
        "median_s": statistics.median(ranked) if ranked else None,
    }


def agreement(rankings: Sequence[Any]) -> dict[str, Any]:
    """Return Krippendorff's alpha and the share of equal orders on items that several ranked.

    A unit of alpha is one response, its values are the ranks (tied ones share their mean) that
    people gave it among the responses of its item.
    """
    shared = []
    for _, rows in groupby(rankings, key=lambda row: row.item):
        ranks = [mid_ranks(row.ranks).tolist() for row in rows if row.ranks is not None]
        if len(ranks) > 1:
            shared.append(ranks)
    pairs = order_agreement(shared)
    return {
        "items": len(shared),
        "alpha": krippendorff_alpha(
            [values for ranks in shared for values in zip(*ranks, strict=True)]
        ),
        "same_order": None if pairs is None else pairs.accuracy,
        "pairs": 0 if pairs is None else pairs.num_pairs,
    }


def models(votes: Sequence[Any]) -> list[dict[str, Any]]:
    """Return battles, wins, ties and the win rate (ties half) per model, best first."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in votes:
        for side, name in zip("ab", row.models, strict=True):
            counts[name]["battles"] += 1
            counts[name][{side: "wins"}.get(row.vote, row.vote)] += 1
    table = []
    for name, count in counts.items():
        half = (count["tie"] + count["bad"]) / 2
        table.append(
            {
                "model": name,
                "battles": count["battles"],
                "wins": count["wins"],
                "ties": count["tie"],
                "both_bad": count["bad"],
                "win_rate": (count["wins"] + half) / count["battles"],
            }
        )
    return sorted(table, key=lambda row: (-row["win_rate"], row["model"]))
