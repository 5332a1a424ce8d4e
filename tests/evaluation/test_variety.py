"""Self-BLEU against sacrebleu, distinct-n's interval against new draws, many answers by hand."""

import numpy as np
import pytest

from rayrlhf.evaluation.bleu import self_bleu
from rayrlhf.evaluation.bootstrap import mean_interval, ratio_interval
from rayrlhf.evaluation.diversity import distinct_n
from rayrlhf.evaluation.judges import Answer
from rayrlhf.evaluation.variety import distinct_interval, variety

TEXTS = (
    "a good film",
    "a good film about a dog",
    "the dog is good good good",
    "so so so so so",
    "no match whatsoever here at all",
    "fine",
    "the dog is good",
)
# sacrebleu 2.6.0: BLEU(tokenize="none", smooth_method="exp", effective_order=True)
# .sentence_score(text, all other texts).score / 100
SACREBLEU = (0.7165313105737896, 0.32466791547509904, 0.508132748154615, 0.0, 0.0, 0.0, 1.0)


def answer(response: str) -> Answer:
    return Answer("Say it", response, [1], [2], [0.0], ended=True)


def test_self_bleu_is_sacrebleus() -> None:
    assert self_bleu([text.split() for text in TEXTS]) == pytest.approx(SACREBLEU, abs=1e-12)


def test_self_bleu_at_its_ends() -> None:
    assert self_bleu([["a", "b"], ["a", "b"]]) == [1.0, 1.0]
    assert self_bleu([["a"], ["b"], []]) == [0.0, 0.0, 0.0]
    assert self_bleu([["a"]]) == [0.0]
    # "a b" in "a b c d": every n-gram matches, brevity exp(1 - 4/2); back: 2 of 4, 1 of 3, none of
    # 2 (half a match), none of 1 (a quarter).
    short, long = self_bleu([["a", "b"], ["a", "b", "c", "d"]])
    assert short == pytest.approx(np.exp(-1.0))
    assert long == pytest.approx((2 / 4 * 1 / 3 * 0.5 / 2 * 0.25 / 1) ** 0.25)


def test_ratio_of_sums_counts_tokens_alike() -> None:
    found = ratio_interval([2.0, 30.0], [1, 10], seed=0)
    assert found.value == pytest.approx(32 / 11)
    assert (found.low, found.high) == pytest.approx((2.0, 3.0))  # one prompt drawn twice
    assert ratio_interval([0.0], [0], seed=0).value == 0.0
    assert mean_interval([1.0, 1.0, 1.0], seed=0).low == 1.0


def test_interval_of_distinct_n_is_as_wide_as_new_texts_are_apart() -> None:
    rng = np.random.default_rng(0)

    def draw() -> list[str]:
        words = rng.zipf(1.5, size=(100, 8)) % 500
        return [" ".join(f"w{word}" for word in row) for row in words]

    values = [distinct_n(draw(), 1) for _ in range(300)]
    found = distinct_interval(draw(), 1, seed=0)
    assert found.low < found.value < found.high
    width = float(np.quantile(values, 0.975) - np.quantile(values, 0.025))
    assert found.high - found.low == pytest.approx(width, rel=0.35)
    # The plain bootstrap would be centred on about two thirds of the value.
    assert (found.low + found.high) / 2 == pytest.approx(found.value, rel=0.02)


def test_distinct_n_of_one_text_has_no_interval() -> None:
    found = distinct_interval(["so so"], 1, seed=0)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_many_answers_to_one_prompt() -> None:
    once = {"ppo": [answer("a b"), answer("a b")]}
    # Two of three differ (space around does not count), and one of three.
    many = {"ppo": [[answer(t) for t in (" a b", "a b ", "c d")], [answer("x y")] * 3]}
    found = variety(once, many, seed=0)["ppo"]
    assert found["distinct_answers"] == {"value": 1.5, "low": 1.0, "high": 2.0}
    assert found["self_bleu_one_prompt"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["self_bleu"]["value"] == 1.0
    assert (found["distinct_1"]["value"], found["distinct_2"]["value"]) == (0.5, 0.5)
    assert found["distinct_3"]["value"] == 0.0
    assert "distinct_answers" not in variety(once, {}, seed=0)["ppo"]
