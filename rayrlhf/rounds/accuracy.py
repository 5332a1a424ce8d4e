"""Reward models before and after a round, on answers of the policy that neither has trained on."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import Recipe
from rayrlhf.data.datasets import encode_prompt
from rayrlhf.data.records import Record
from rayrlhf.data.tokenizer import encode_text
from rayrlhf.evaluation.bootstrap import as_dict, ratio_interval
from rayrlhf.evaluation.comparison import device, release
from rayrlhf.evaluation.judges import RewardJudge
from rayrlhf.models.scalar_head import ScalarHeadModel

Floats = npt.NDArray[np.float64]


def tokens_per_batch(recipe: Recipe) -> int:
    """Return the tokens that one forward pass of a judging model holds."""
    return recipe.model.max_length * (recipe.evaluate.batch_size if recipe.evaluate else 16)


def scores_of(
    folder: Path,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    batch: int,
) -> list[Floats]:
    """Return the scores (K,) of each record's responses, `batch` tokens at a time.

    The model is in memory only meanwhile.
    """
    eos_id = int(tokenizer.eos_token_id)
    judge = RewardJudge(
        ScalarHeadModel.from_pretrained(folder),
        eos_id=eos_id,
        tokens_per_batch=batch,
        device=device(),
    )
    scores = judge.score_ids(
        [
            [*encode_prompt(record, tokenizer), *encode_text(tokenizer, response), eos_id]
            for record in records
            for response in record["responses"]
        ]
    )
    del judge
    release()
    ends = np.cumsum([len(record["responses"]) for record in records])
    return np.split(scores, ends[:-1])


def compare(
    records: Sequence[Record], before: Sequence[Floats], after: Sequence[Floats], *, seed: int
) -> dict[str, Any]:
    """Return the pair accuracies of two reward models, and their difference, with 95% intervals.

    Pairs are those of a record with different ranks; intervals draw records.
    """
    counts = np.array([len(_pairs(record)) for record in records], dtype=np.float64)
    right = [
        np.array([_num_right(r, s) for r, s in zip(records, scores, strict=True)])
        for scores in (before, after)
    ]
    return {
        "num_pairs": int(counts.sum()),
        "pair_accuracy_before": as_dict(ratio_interval(right[0], counts, seed=seed)),
        "pair_accuracy": as_dict(ratio_interval(right[1], counts, seed=seed)),
        "pair_accuracy_gain": as_dict(ratio_interval(right[1] - right[0], counts, seed=seed)),
    }


def _pairs(record: Record) -> list[tuple[int, int]]:
    """Return the pairs (better, worse)."""
    ranks = record["ranks"]
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i, j in combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j]
    ]


def _num_right(record: Record, scores: Floats) -> float:
    """Return how many pairs have the higher score on the better side; equal ones are half right."""
    gaps = [scores[better] - scores[worse] for better, worse in _pairs(record)]
    return float(sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps))
