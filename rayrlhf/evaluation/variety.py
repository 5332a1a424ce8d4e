"""What RLHF costs in variety: of the answers to different prompts, and of many to one prompt.

Intervals (95%) are over prompts. Means and ratios of sums take the bootstrap. Distinct-n does not:
a prompt that is drawn twice repeats all its n-grams, and the fewer the texts the larger it is, so
its spread is that of halves of the prompts without replacement, which is the spread of the whole
(1/m - 1/n = 1/n at m = n/2). Self-BLEU is a mean over answers; the others are held as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrlhf.evaluation.bleu import self_bleu
from rayrlhf.evaluation.bootstrap import as_dict, bounds, mean_interval
from rayrlhf.evaluation.diversity import distinct_n, ngrams, words_of
from rayrlhf.evaluation.judges import Answer
from rayrlhf.evaluation.ratings import Interval

Floats = npt.NDArray[np.float64]

_HALVES = 500
ORDERS = (1, 2, 3)


def variety(
    answers: Mapping[str, Sequence[Answer]],
    repeated: Mapping[str, Sequence[Sequence[Answer]]],
    *,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return {model: {measure: {value, low, high}}}.

    `answers[model]` has one answer per prompt, `repeated[model]` several to each of some prompts
    ({} without). Measures: `distinct_1` to `distinct_3`, `self_bleu`, and of the repeated answers
    `distinct_answers` (how many of them differ, mean over prompts) and `self_bleu_one_prompt`.
    """
    return {
        model: {
            name: as_dict(interval)
            for name, interval in {
                **_across(given, seed),
                **_within(repeated.get(model, ()), seed),
            }.items()
        }
        for model, given in answers.items()
    }


def _across(answers: Sequence[Answer], seed: int) -> dict[str, Interval]:
    texts = [answer.response for answer in answers]
    found = {f"distinct_{n}": distinct_interval(texts, n, seed=seed) for n in ORDERS}
    found["self_bleu"] = mean_interval(self_bleu([words_of(text) for text in texts]), seed=seed)
    return found


def _within(groups: Sequence[Sequence[Answer]], seed: int) -> dict[str, Interval]:
    if not groups:
        return {}
    texts = [[answer.response.strip() for answer in group] for group in groups]
    overlap = [float(np.mean(self_bleu([words_of(text) for text in group]))) for group in texts]
    return {
        "distinct_answers": mean_interval([len(set(group)) for group in texts], seed=seed),
        "self_bleu_one_prompt": mean_interval(overlap, seed=seed),
    }


def distinct_interval(texts: Sequence[str], n: int, *, seed: int) -> Interval:
    """Return distinct-n of the texts, one per prompt; the interval is cut to 0 to 1."""
    value = distinct_n(texts, n)
    half = len(texts) // 2
    if half < 1:
        return Interval(value, value, value)
    numbers: dict[tuple[str, ...], int] = {}
    grams = [
        [numbers.setdefault(gram, len(numbers)) for gram in ngrams(words_of(text), n)]
        for text in texts
    ]
    flat = np.array([number for ids in grams for number in ids], dtype=np.int64)
    rows = np.repeat(np.arange(len(texts)), [len(ids) for ids in grams])
    rng = np.random.default_rng(seed)
    shares = np.zeros(_HALVES)
    for number in range(_HALVES):
        is_drawn = np.zeros(len(texts), dtype=bool)
        is_drawn[rng.permutation(len(texts))[:half]] = True
        held = flat[is_drawn[rows]]
        distinct = np.count_nonzero(np.bincount(held, minlength=1))
        shares[number] = distinct / max(1, len(held))
    low, high = bounds(value + shares - shares.mean())
    return Interval(value, max(0.0, low), min(1.0, high))
