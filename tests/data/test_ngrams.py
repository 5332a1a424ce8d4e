"""Sets of n-grams: by words, whatever the case and punctuation; Jaccard by hand."""

import numpy as np
import pytest

from rayrlhf.data.ngrams import jaccard, ngram_hashes, share_any


def test_words_alone_count() -> None:
    a, b, c, d = ngram_hashes(
        ["The cat, sat down!", "the CAT sat\ndown", "down sat cat the", ""], 2
    )
    assert np.array_equal(a, b)
    assert len(a) == 3
    assert not np.array_equal(a, c)
    assert d.size == 0


def test_a_short_text_is_one_ngram_of_all_its_words() -> None:
    short, longer = ngram_hashes(["a b", "a b c d e f"], 5)
    assert len(short) == 1
    assert len(longer) == 2


def test_repetitions_count_once() -> None:
    assert len(ngram_hashes(["a b a b a b"], 2)[0]) == 2


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("a b c d", "a b c d", 1.0), ("a b c d", "a b c e", 0.5), ("a b", "c d", 0.0), ("", "", 0.0)],
)
def test_jaccard(a: str, b: str, expected: float) -> None:
    # "a b c d" and "a b c e" share (a b) and (b c) of four bigrams.
    assert jaccard(*ngram_hashes([a, b], 2)) == expected


def test_share_any() -> None:
    evaluation = np.unique(np.concatenate(ngram_hashes(["one two three", "four five six"], 3)))
    inside, outside, empty = ngram_hashes(["so: One, two, three!", "two three four five", ""], 3)
    assert share_any(inside, evaluation)
    assert not share_any(outside, evaluation)
    assert not share_any(empty, evaluation)
    assert not share_any(inside, evaluation[:0])
