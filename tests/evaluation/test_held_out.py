"""Held-out texts: distinct ones per source, ranks or ratings, and the loss in nats per token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf.evaluation.held_out import agreement, held_out_loss, rated_texts
from rayrlhf.models.causal_lm import CausalLMModel


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)


def comparison(source: str, texts: list[str], means: list[float], **extra: Any) -> dict[str, Any]:
    order = sorted(set(means), reverse=True)
    return {
        "prompt": "Review:",
        "responses": texts,
        "source": source,
        "ranks": [order.index(m) + 1 for m in means],
        "ratings": means,
        **extra,
    }


def test_rated_texts_compare_across_records_and_once_each(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    records = [
        comparison("movies", [" good", " bad"], [2.0, -2.0]),
        comparison("movies", [" fine", " bad"], [1.0, -2.0]),
        comparison("tweets", [" ok", " no"], [1.0, 0.0]),
    ]
    found = rated_texts(records, tokenizer, 64)
    assert found["movies"].texts == ["Review: good", "Review: bad", "Review: fine"]
    assert found["movies"].groups == [[0, 1, 2]]
    assert [ids[-1] for ids in found["tweets"].ids] == [tokenizer.eos_token_id] * 2
    row = agreement(found["movies"], np.array([3.0, 1.0, 2.0]), np.array([0.0, 0.0, 0.0]))
    assert row is not None
    assert (row["pair_accuracy"], row["num_pairs"], row["num_texts"]) == (1.0, 3, 3)
    assert row["pearson"] == pytest.approx(np.corrcoef([3.0, 1.0, 2.0], [2.0, -2.0, 1.0])[0, 1])
    assert (row["vader_pair_accuracy"], row["vader_pearson"]) == (0.5, None)
    assert row["human_pair_accuracy"] is None


def test_ranks_compare_within_their_record_only(tokenizer: PreTrainedTokenizerFast) -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "Q:", "responses": [" a", " b", " c"], "ranks": [1, 2, 2]},
        {"prompt": "Q:", "responses": [" d", " e"], "ranks": [2, 1]},
    ]
    found = rated_texts(records, tokenizer, 64)["all"]
    assert found.groups == [[0, 1, 2], [3, 4]]
    row = agreement(found, np.array([9.0, 1.0, 2.0, 5.0, 3.0]), np.zeros(5))
    assert row is not None
    assert row["num_pairs"] == 3  # a>b, a>c, e>d; b = c is left out
    assert row["pair_accuracy"] == pytest.approx(2 / 3)
    assert row["pearson"] is None


def test_human_raters_are_those_of_the_records(tokenizer: PreTrainedTokenizerFast) -> None:
    judged = comparison("tweets", [" good", " bad"], [2.0, -2.0], single_ratings=[[3, 1], [-1, -3]])
    texts = rated_texts([judged], tokenizer, 64)["tweets"]
    row = agreement(texts, np.array([1.0, 0.0]), np.zeros(2))
    assert row is not None and row["human_pair_accuracy"] == 1.0
    assert [b["human_pair_accuracy"] for b in row["by_rating_gap"]] == [1.0]
    # A text of which single ratings are not known leaves the source without a ceiling.
    both = [judged, comparison("tweets", [" ok", " no"], [1.0, 0.0])]
    assert rated_texts(both, tokenizer, 64)["tweets"].single_ratings == []


def test_lengths_are_those_of_the_responses(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = rated_texts([comparison("a", [" good", " bad bad"], [1.0, 0.0])], tokenizer, 64)["a"]
    wanted = [len(tokenizer(text)["input_ids"]) for text in (" good", " bad bad")]
    assert texts.lengths.tolist() == wanted


def test_loss_is_the_mean_over_tokens_of_all_rows(tiny_model: Path) -> None:
    model = CausalLMModel.from_pretrained(tiny_model).eval()
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    total = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model.hf(torch.tensor([row])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(row[1:]), reduction="sum"
        ).item()
    for budget in (2, 100):
        assert held_out_loss(model, rows, tokens_per_batch=budget) == pytest.approx(
            total / 7, abs=1e-5
        )
