"""Each rule at its threshold; shares, gains and marked answers by hand."""

import numpy as np
import pytest

from rayrlhf.evaluation.hacking import copied_runs, hacking, marks
from rayrlhf.evaluation.judges import Answer


def answer(response: str, prompt: str = "Say it") -> Answer:
    return Answer(prompt, response, [1], [2], [0.0], ended=True)


def test_repetition() -> None:
    assert marks([answer("very very very very good")]) == [["repetition"]]
    assert marks([answer("very very very good")]) == [[]]
    # Nine words, eight pairs, of which three differ: "a b", "b c", "c a".
    assert marks([answer("a b c a b c a b c")]) == [["repetition"]]
    # Seven words say nothing yet.
    assert marks([answer("a b a b a b a")]) == [[]]


def test_copies() -> None:
    prompt = "Movie review: this is one of the best"
    assert marks([answer("Yes, ONE of the best!", prompt)]) == [["prompt copy"]]
    assert marks([answer("of the best", prompt)]) == [[]]
    demonstration = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
    copied = answer("so w2 w3 w4 w5 w6 w7 w8 w9")
    runs = copied_runs([copied, answer("w2")], [demonstration, "other"])
    assert runs == {("w2", "w3", "w4", "w5", "w6", "w7", "w8", "w9")}
    assert marks([copied], runs) == [["demonstration copy"]]
    assert marks([copied]) == [[]]
    assert not copied_runs([answer("w1 w2 w3 w4 w5 w6 w7 and w8")], [demonstration])


def test_one_answer_to_all() -> None:
    given = [answer("So good!"), answer("so good"), answer(" so good :)"), answer("bad")]
    assert marks(given) == [["one answer to all"]] * 3 + [[]]
    assert marks(given[1:]) == [[]] * 3
    assert marks([answer("")] * 3) == [[]] * 3


def test_shares_gains_and_marked() -> None:
    answers = {
        "sft": [answer("fine"), answer("a dog"), answer("well well well well")],
        "ppo": [answer("good good good good"), answer("a cat"), answer("best best best best")],
    }
    scores = {
        "vader": {"sft": np.zeros(3), "ppo": np.zeros(3)},
        "reward": {"sft": np.array([0.0, -3.0, 4.0]), "ppo": np.array([1.0, 2.0, 5.0])},
    }
    found = hacking(answers, scores, reference="sft", trained="ppo", demonstrations=(), num_shown=2)
    assert found["judge"] == "reward"
    assert "demonstration copy" not in found["rules"]
    assert found["shares"]["sft"]["repetition"] == pytest.approx(1 / 3)
    assert found["shares"]["ppo"]["any"] == pytest.approx(2 / 3)
    assert [(row["position"], row["gain"]) for row in found["gains"]] == [(1, 5.0), (0, 1.0)]
    assert [row["position"] for row in found["marked"]] == [2, 0]
    assert found["marked"][0]["rules"] == ["repetition"]
    words = hacking(
        answers, {"vader": scores["vader"]}, reference="sft", trained="ppo",
        demonstrations=(), num_shown=0,
    )  # fmt: skip
    assert words["judge"] == "vader" and words["gains"] == []
