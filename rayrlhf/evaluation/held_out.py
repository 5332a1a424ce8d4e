"""Held-out texts: agreement of the reward model with people, and every stage's loss, per source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import Recipe
from rayrlhf.data.datasets import Record, encode_comparisons, pad, read_records
from rayrlhf.data.packing import microbatches
from rayrlhf.data.rows import PackedRows
from rayrlhf.evaluation.agreement import (
    PairAccuracy,
    calibration,
    human_ceiling,
    pair_accuracy,
    pair_accuracy_within,
    pearson,
)
from rayrlhf.models.causal_lm import CausalLMModel

Floats = npt.NDArray[np.float64]

_BUILTIN = "builtin:human-ratings/comparisons."


@dataclass(frozen=True)
class RatedTexts:
    """The distinct texts of one source, each a prompt with a response, and what people said."""

    texts: list[str]
    responses: list[str]
    ids: list[list[int]]
    """Token ids, end-of-text included."""
    ratings: Floats
    """(N,) mean rating, or minus the rank; higher is better."""
    groups: list[list[int]]
    """Positions within which ratings compare: all of them, or those of one record each."""

    def split(self, values: Floats) -> list[Floats]:
        """Return the values of each group."""
        return [values[group] for group in self.groups]


def rated_texts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> dict[str, RatedTexts]:
    """Return the texts of comparisons by source (`all` for a record that names none).

    When every record of a source has `ratings`, all its texts compare with each other; ranks
    compare within their record only.
    """
    by_source: dict[str, list[tuple[Record, int, list[int]]]] = {}
    for comparison in encode_comparisons(records, tokenizer, max_length):
        record = records[comparison.record]
        rows = by_source.setdefault(str(record.get("source", "all")), [])
        rows += [(record, k, ids) for k, ids in zip(comparison.kept, comparison.ids, strict=True)]
    return {source: _distinct(rows) for source, rows in by_source.items()}


def _distinct(rows: Sequence[tuple[Record, int, list[int]]]) -> RatedTexts:
    """Keep the first of equal texts."""
    rated = all(record.get("ratings") is not None for record, _, _ in rows)
    texts: list[str] = []
    responses: list[str] = []
    sequences: list[list[int]] = []
    ratings: list[float] = []
    groups: dict[int, list[int]] = {}
    seen: set[str] = set()
    for record, k, ids in rows:
        text = record["prompt"] + record["responses"][k]
        if text in seen:
            continue
        seen.add(text)
        groups.setdefault(0 if rated else id(record), []).append(len(texts))
        texts.append(text)
        responses.append(record["responses"][k])
        sequences.append(ids)
        ratings.append(float(record["ratings"][k]) if rated else -float(record["ranks"][k]))
    return RatedTexts(texts, responses, sequences, np.array(ratings), list(groups.values()))


def single_ratings(comparisons: str) -> dict[str, list[float]]:
    """Return every person's rating of each text, by text; {} unless the data set is built in."""
    if not comparisons.startswith(_BUILTIN):
        return {}
    path = comparisons.replace("/comparisons.", "/ratings.")
    return {
        record["text"].strip(): [float(r) for r in record["ratings"]]
        for record in read_records(path, "document")
    }


def agreement(
    texts: RatedTexts, scores: Floats, vader: Floats, people: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """Return the row of results.json for one source; None when no two ratings differ.

    `scores` and `vader` are (N,), aligned with the texts.
    """
    found = _accuracy(texts, scores)
    if found is None:
        return None
    by_rules = _accuracy(texts, vader)
    single = [people[r.strip()] for r in texts.responses if r.strip() in people]
    absolute = len(texts.groups) == 1
    return {
        "pair_accuracy": found.accuracy,
        "pearson": pearson(scores, texts.ratings) if absolute else None,
        "num_pairs": found.num_pairs,
        "num_texts": len(texts.texts),
        "human_pair_accuracy": human_ceiling(single),
        "vader_pair_accuracy": by_rules.accuracy if by_rules else None,
        "vader_pearson": pearson(vader, texts.ratings) if absolute else None,
    }


def pooled_calibration(
    texts: Mapping[str, RatedTexts], scores: Mapping[str, Floats]
) -> list[dict[str, float]]:
    """Return the calibration bins over the pairs of all sources, none across sources."""
    groups = [
        (s, r)
        for source, rated in texts.items()
        for s, r in zip(rated.split(scores[source]), rated.split(rated.ratings), strict=True)
    ]
    return calibration([s for s, _ in groups], [r for _, r in groups])


def held_out_rows(recipe: Recipe, texts: Mapping[str, RatedTexts]) -> dict[str, list[list[int]]]:
    """Return token ids to take the loss on, by source.

    Packed rows of the corpus that no stage trained on, `test` before `validation`; without a
    corpus, the texts of the comparisons.
    """
    rows: dict[str, list[list[int]]] = {}
    for source, cfg in (recipe.corpus.sources if recipe.corpus else {}).items():
        split = "test" if cfg.test else "validation" if cfg.validation else None
        if split is not None:
            packed = PackedRows(recipe.path / "corpus", f"{split}-{source}")
            if len(packed):
                rows[source] = packed[range(len(packed))].tolist()
    return rows or {source: rated.ids for source, rated in texts.items()}


@torch.inference_mode()
def held_out_loss(
    model: CausalLMModel, rows: Sequence[list[int]], *, tokens_per_batch: int
) -> float:
    """Return the mean negative log-probability in nats of all tokens but each row's first."""
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    for indices in microbatches([len(row) for row in rows], tokens_per_batch):
        input_ids, attention_mask = pad([rows[i] for i in indices], 0)
        log_probs = model(input_ids.to(device), attention_mask.to(device))  # (b, S)
        mask = attention_mask.to(device)[:, 1:]
        total -= float((log_probs[:, 1:].double() * mask).sum())
        num_tokens += int(mask.sum())
    return total / max(1, num_tokens)


def _accuracy(texts: RatedTexts, scores: Floats) -> PairAccuracy | None:
    if len(texts.groups) == 1:
        return pair_accuracy(scores, texts.ratings)
    return pair_accuracy_within(texts.split(scores), texts.split(texts.ratings))
