"""Self-BLEU: how much of each text is in the others; 1 is a set of equal texts.

Of its own, and not a package's: a text is compared with all the others of its set, so the n-grams
of each are counted once here, where sentence BLEU counts those of all references for every text
anew (200 texts of 25 words: 0.02 s in place of 30 s). The numbers are sacrebleu's, with which tests
compare them.
"""

import math
from collections import Counter
from collections.abc import Sequence

_MAX_ORDER = 4
_Gram = tuple[str, ...]


def self_bleu(texts: Sequence[Sequence[str]]) -> list[float]:
    """Return the BLEU (0 to 1) of each text, given as words, with the other texts as references.

    N-grams up to 4, no further than the text is long; an order without a match counts as half a
    match, the next one as a quarter and so on; of references equally near in length, the shorter.
    A text that shares no word with another has 0.
    Source: arXiv:1802.01886, section 2.4; smoothing and lengths as in sacrebleu's `sentence_bleu`
    (`exp`, effective order), arXiv:1804.08771.
    """
    lengths = Counter(len(words) for words in texts)
    counted = [_grams(words) for words in texts]
    most = _two_largest(counted)
    found = []
    for words, grams in zip(texts, counted, strict=True):
        others = lengths - Counter([len(words)])
        if not words or not others:
            found.append(0.0)
            continue
        matches = [0] * (_MAX_ORDER + 1)
        for gram, count in grams.items():
            largest, holders, second = most[gram]
            rest = second if count == largest and holders == 1 else largest
            matches[len(gram)] += min(count, rest)
        nearest = min(others, key=lambda length: (abs(length - len(words)), length))
        found.append(_bleu(matches, len(words), nearest))
    return found


def _grams(words: Sequence[str]) -> Counter[_Gram]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, _MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def _two_largest(counted: Sequence[Counter[_Gram]]) -> dict[_Gram, tuple[int, int, int]]:
    """Return per n-gram its largest count in a text, in how many texts, and the next largest."""
    most: dict[_Gram, tuple[int, int, int]] = {}
    for grams in counted:
        for gram, count in grams.items():
            largest, holders, second = most.get(gram, (0, 0, 0))
            if count > largest:
                most[gram] = (count, 1, largest)
            elif count == largest:
                most[gram] = (largest, holders + 1, second)
            elif count > second:
                most[gram] = (largest, holders, count)
    return most


def _bleu(matches: Sequence[int], length: int, reference_length: int) -> float:
    """Return the geometric mean of the precisions times the brevity penalty."""
    if not any(matches):
        return 0.0
    orders = min(_MAX_ORDER, length)
    smoothing, logs = 1.0, 0.0
    for order in range(1, orders + 1):
        total = length - order + 1
        if matches[order]:
            logs += math.log(matches[order] / total)
        else:
            smoothing *= 2
            logs -= math.log(smoothing * total)
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(brevity + logs / orders)
