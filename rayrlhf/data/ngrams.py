"""Hashes of word n-grams: the sets that near-duplicates and evaluation texts are found by."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, from the golden ratio: spreads low bits


def ngram_hashes(texts: Sequence[str], n: int) -> list[Hashes]:
    """Return the distinct 64-bit hashes of each text's n-grams of lower-case words, sorted.

    A text of fewer than n words is one n-gram of all its words; one without words has none.
    """
    from rensa import RMinHash

    hashed = RMinHash.hash_token_sets([_WORD.findall(text.lower()) for text in texts])
    return [_ngrams(np.array(words, dtype=np.uint64), n) for words in hashed]


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return |a & b| / |a | b| of two sets in the form of `ngram_hashes`; 0 for two empty sets."""
    both = np.intersect1d(a, b, assume_unique=True).size
    union = a.size + b.size - both
    return both / union if union else 0.0


def share_any(hashes: Hashes, others: Hashes) -> bool:
    """Tell whether a hash is among the sorted `others`."""
    if not others.size:
        return False
    places = np.searchsorted(others, hashes)
    return bool((others[np.minimum(places, others.size - 1)] == hashes).any())


def _ngrams(words: Hashes, n: int) -> Hashes:
    if not words.size:
        return words
    n = min(n, words.size)
    count = words.size - n + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        # Position matters: "a b" is not "b a".
        mixed = (mixed ^ words[k : k + count]) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)
