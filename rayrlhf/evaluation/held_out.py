"""Held-out texts: agreement of the reward model with people, and every stage's loss, per source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import Recipe
from rayrlhf.data.datasets import Record, encode_comparisons, pad
from rayrlhf.data.packing import microbatches
from rayrlhf.data.records import identity, joined
from rayrlhf.data.rows import PackedRows
from rayrlhf.evaluation.agreement import (
    PairAccuracy,
    calibration,
    human_ceiling,
    pair_accuracy,
    pair_accuracy_within,
    pearson,
)
from rayrlhf.evaluation.diagnostics import (
    accuracy_by,
    calibration_error,
    centred,
    length_bias,
    rated_pairs,
    right,
    right_people,
)
from rayrlhf.models.causal_lm import CausalLMModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RatedTexts:
    """The distinct texts of one source, each a prompt with a response, and what people said."""

    texts: list[str]
    ids: list[list[int]]
    """Token ids, end-of-text included."""
    ratings: Floats
    """(N,) mean rating, or minus the rank; higher is better."""
    lengths: Floats
    """(N,) tokens of the response, without end-of-text."""
    single_ratings: list[list[float]]
    """What each person said of each text; [] unless all texts have it."""
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
    by_source: dict[str, list[_Row]] = {}
    for comparison in encode_comparisons(records, tokenizer, max_length):
        record = records[comparison.record]
        rows = by_source.setdefault(str(record.get("source", "all")), [])
        other = comparison.prompt_length + 1  # end-of-text
        rows += [
            _Row(record, k, ids, len(ids) - other)
            for k, ids in zip(comparison.kept, comparison.ids, strict=True)
        ]
    return {source: _distinct(rows) for source, rows in by_source.items()}


@dataclass(frozen=True)
class _Row:
    """Response k of a comparison."""

    record: Record
    k: int
    ids: list[int]
    length: int

    @property
    def text(self) -> str:
        response = self.record["responses"][self.k]
        return joined(self.record["prompt"], response, is_chat="messages" in self.record)

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others: the text, and the chat where it is an answer in one."""
        return self.text, identity(self.record) if "messages" in self.record else ""


def _distinct(rows: Sequence[_Row]) -> RatedTexts:
    """Keep the first of equal texts."""
    rated = all(row.record.get("ratings") is not None for row in rows)
    judged = all(row.record.get("single_ratings") is not None for row in rows)
    first: dict[tuple[str, str], _Row] = {}
    for row in rows:
        first.setdefault(row.key, row)
    kept = list(first.values())
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(kept):
        groups.setdefault(0 if rated else id(row.record), []).append(number)
    values = [
        float(row.record["ratings"][row.k]) if rated else -float(row.record["ranks"][row.k])
        for row in kept
    ]
    return RatedTexts(
        [row.text for row in kept],
        [row.ids for row in kept],
        np.array(values),
        np.array([row.length for row in kept], dtype=np.float64),
        [row.record["single_ratings"][row.k] for row in kept] if judged else [],
        list(groups.values()),
    )


def agreement(texts: RatedTexts, scores: Floats, vader: Floats) -> dict[str, Any] | None:
    """Return the row of results.json for one source; None when no two ratings differ.

    `scores` and `vader` are (N,), aligned with the texts.
    """
    found = _accuracy(texts, scores)
    if found is None:
        return None
    by_rules = _accuracy(texts, vader)
    absolute = len(texts.groups) == 1
    return {
        "pair_accuracy": found.accuracy,
        "pearson": pearson(scores, texts.ratings) if absolute else None,
        "num_pairs": found.num_pairs,
        "num_texts": len(texts.texts),
        "human_pair_accuracy": human_ceiling(texts.single_ratings, texts.groups),
        "vader_pair_accuracy": by_rules.accuracy if by_rules else None,
        "vader_pearson": pearson(vader, texts.ratings) if absolute else None,
        **diagnostics({"": texts}, {"": scores}),
        "length_bias": length_bias(
            centred(scores, texts.groups),
            centred(texts.ratings, texts.groups),
            centred(texts.lengths, texts.groups),
            rated_pairs(texts.ratings, texts.groups),
        ),
    }


def diagnostics(texts: Mapping[str, RatedTexts], scores: Mapping[str, Floats]) -> dict[str, Any]:
    """Return calibration error and accuracy by rating gap and length, over the pairs of sources.

    No pair is across sources. `by_length` is by the longer one of a pair's responses.
    """
    gaps, lengths, correct, people = [], [], [], []
    for source, rated in texts.items():
        pairs = rated_pairs(rated.ratings, rated.groups)
        gaps.append(pairs.gap(rated.ratings))
        lengths.append(np.maximum(rated.lengths[pairs.better], rated.lengths[pairs.worse]))
        correct.append(right(pairs.gap(scores[source])))
        people.append(right_people(pairs, rated.single_ratings))
    all_correct, all_people = np.concatenate(correct), np.concatenate(people, axis=1)
    return {
        "calibration_error": calibration_error(pooled_calibration(texts, scores)),
        "by_rating_gap": accuracy_by(np.concatenate(gaps), all_correct, all_people),
        "by_length": accuracy_by(np.concatenate(lengths), all_correct, all_people),
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
