"""A language model as a judge: biased, slow, failing, talking nonsense; and its cache."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.config import JudgeConfig, RecipeError
from rayrlhf.evaluation.llm_judge import (
    REMINDER,
    Battle,
    LLMJudge,
    Positions,
    positions,
    settle,
)
from rayrlhf.evaluation.verdicts import VerdictCache
from rayrlhf.external import endpoints
from rayrlhf.external.endpoints import EndpointDown
from tests.external.scorer import Answer, Scorer, serving

BATTLES = [Battle(f"Question {n}", f"good {n}", f"bad {n}") for n in range(6)]
Say = Callable[[str, str], str]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "backoff_s", lambda attempt: 0.01 * 2**attempt)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def replying(say: Say) -> Callable[[dict[str, Any], int], Answer]:
    """Answer as a chat API does, with what `say` makes of the two responses."""

    def answer(body: dict[str, Any], _: int) -> Answer:
        asked = body["messages"][1]["content"]
        a, b = (
            asked.partition(f"<response_{side}>\n")[2].partition(f"\n</response_{side}>")[0]
            for side in "ab"
        )
        return 200, {"choices": [{"message": {"role": "assistant", "content": say(a, b)}}]}

    return answer


def fair(a: str, b: str) -> str:
    return f"I thought of [[C]] first. [[{'A' if a.startswith('good') else 'B'}]]"


def judge_at(server: Scorer, path: Path, **keys: Any) -> LLMJudge:
    url = server.url.removesuffix("/score") + "/v1"
    judge = JudgeConfig(**{"url": url, "llm": "big", **keys})
    return LLMJudge(f"evaluate.judges.0.url={url}", judge, VerdictCache(path / "verdicts.jsonl"))


def test_both_orders_are_asked_and_a_fair_judge_agrees_with_itself(tmp_path: Path) -> None:
    with serving(replying(fair)) as server:
        judge = judge_at(server, tmp_path, options={"temperature": 0, "seed": 3}, max_pending=2)
        verdicts = judge.judge(BATTLES)
        assert server.most_pending <= 2
    assert verdicts == [("A", "B")] * 6
    assert settle(verdicts).tolist() == [1.0] * 6
    assert positions(BATTLES, verdicts) == Positions(6, 0, 0, 6, 6)
    assert len(server.bodies) == 12
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["seed"]) == ("big", 0, 3)
        assert "helpful" in body["messages"][0]["content"]


def test_a_liking_for_the_first_position_makes_ties_and_is_reported(tmp_path: Path) -> None:
    with serving(replying(lambda a, b: "[[A]]")) as server:
        verdicts = judge_at(server, tmp_path).judge(BATTLES)
    assert settle(verdicts).tolist() == [0.5] * 6
    assert positions(BATTLES, verdicts) == Positions(6, 0, 6, 12, 0)


def test_a_win_needs_both_orders() -> None:
    both: list[tuple[str | None, str | None]]
    both = [("A", "B"), ("B", "A"), ("C", "C"), ("A", "C"), ("A", "A"), (None, "B"), ("A", None)]
    won = settle(both)
    assert won[:5].tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert np.isnan(won[5:]).all()
    assert positions(BATTLES[:1] * 7, both) == Positions(7, 2, 2, 5, 2)


def test_the_swap_cancels_a_liking_for_a_position() -> None:
    """Equal models before a judge who prefers the first answer in four of five battles."""
    first = np.random.default_rng(0).random((2, 4000)) < 0.8
    verdicts = [("A" if one else "B", "A" if two else "B") for one, two in first.T]
    won = settle(verdicts)
    assert first[0].mean() == pytest.approx(0.8, abs=0.02)  # one order alone
    assert won.mean() == pytest.approx(0.5, abs=0.02)
    counts = positions(BATTLES[:1] * 4000, verdicts)
    assert counts.first_wins / (counts.first_wins + counts.second_wins) == pytest.approx(0.8, 0.02)
    assert counts.inconsistent == (won == 0.5).sum()


def test_equal_answers_are_a_tie_and_the_same_question_is_asked_once(tmp_path: Path) -> None:
    twice = [Battle("p", "same", "same"), *BATTLES[:1], *BATTLES[:1]]
    with serving(replying(fair)) as server:
        verdicts = judge_at(server, tmp_path).judge(twice)
    assert settle(verdicts).tolist() == [0.5, 1.0, 1.0]
    assert len(server.bodies) == 2
    assert positions(twice, verdicts).asked == 2


def test_nonsense_is_asked_again_then_counted_and_never_a_tie(tmp_path: Path) -> None:
    def say(a: str, b: str) -> str:
        return "Both are [A] fine." if "3" in a else fair(a, b)

    with serving(replying(say)) as server:
        verdicts = judge_at(server, tmp_path, retries=2).judge(BATTLES)
        again = [body for body in server.bodies if "Question 3" in str(body)]
    won = settle(verdicts)
    assert math.isnan(won[3]) and (np.delete(won, 3) == 1.0).all()
    assert positions(BATTLES, verdicts) == Positions(6, 1, 0, 5, 5)
    assert len(again) == 2 * 3
    assert again[-1]["messages"][-2:] == [
        {"role": "assistant", "content": "Both are [A] fine."},
        {"role": "user", "content": REMINDER},
    ]
    assert len(VerdictCache(tmp_path / "verdicts.jsonl")) == 10  # what is no verdict is not kept


def test_a_battle_that_is_refused_is_one_battle_less(tmp_path: Path) -> None:
    """A filter, or a context that is too short; a key that is wrong ends it."""

    def filtering(body: dict[str, Any], count: int) -> Answer:
        return (400, {"error": "filter"}) if "Question 3" in str(body) else replying(fair)(body, 0)

    with serving(filtering) as server:
        won = settle(judge_at(server, tmp_path).judge(BATTLES))
        assert math.isnan(won[3]) and (np.delete(won, 3) == 1.0).all()
        server.answer = lambda *_: (401, {})
        with pytest.raises(RecipeError, match="401"):
            judge_at(server, tmp_path / "other").judge(BATTLES)
        server.answer = lambda *_: (400, {})
        with pytest.raises(RecipeError, match="400"):
            judge_at(server, tmp_path / "third").try_out()


def test_a_reply_without_words_is_no_verdict(tmp_path: Path) -> None:
    with serving(lambda *_: (200, {"choices": [{"message": {"content": None}}]})) as server:
        assert judge_at(server, tmp_path, retries=1).judge(BATTLES[:1]) == [(None, None)]
        # Both orders, each with a reminder the second time, after a reply that is not repeated.
        assert [len(body["messages"]) for body in server.bodies] == [2] * 4
        assert sum(REMINDER in body["messages"][-1]["content"] for body in server.bodies) == 2
        with pytest.raises(RecipeError, match=r"big gives no verdict on 2 tries: raise the limit"):
            judge_at(server, tmp_path, retries=1).try_out()


def test_one_that_fails_twice_and_one_that_is_slow_once_are_waited_for(tmp_path: Path) -> None:
    def failing(body: dict[str, Any], count: int) -> Answer:
        if count == 2:
            time.sleep(6.0)
        return (503, {"detail": "busy"}) if count < 2 else replying(fair)(body, count)

    with serving(failing) as server:
        judge = judge_at(server, tmp_path, timeout_s=3, max_pending=1)
        assert settle(judge.judge(BATTLES[:1])).tolist() == [1.0]
        assert len(server.bodies) == 5
        assert settle(judge.judge(BATTLES)).tolist() == [1.0] * 6  # and it can be used again


def test_what_was_paid_for_is_kept_when_the_endpoint_goes_away(tmp_path: Path) -> None:
    """And a line that was cut off when the process was killed is asked for again."""

    def going(body: dict[str, Any], count: int) -> Answer:
        return (500, {}) if count >= 7 else replying(fair)(body, count)

    path = tmp_path / "verdicts.jsonl"
    with serving(going) as server:
        judge = judge_at(server, tmp_path, retries=1, max_pending=1)
        with pytest.raises(EndpointDown, match=r"7 verdicts are kept in .*verdicts\.jsonl: run it"):
            judge.judge(BATTLES)
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) == 7
        path.write_text(text[:-20], encoding="utf-8")

        server.answer = replying(fair)
        server.bodies.clear()
        assert settle(judge_at(server, tmp_path).judge(BATTLES)).tolist() == [1.0] * 6
        assert len(server.bodies) == 12 - 6
        server.bodies.clear()
        assert settle(judge_at(server, tmp_path).judge(BATTLES)).tolist() == [1.0] * 6
        assert server.bodies == []
        # Another question is another verdict.
        judge_at(server, tmp_path, question="Which is shorter?").judge(BATTLES)
        assert len(server.bodies) == 12


def test_the_first_request_says_what_is_wrong_and_is_made_once(tmp_path: Path) -> None:
    with serving(lambda *_: (404, {"error": "no such model"})) as server:
        with pytest.raises(RecipeError, match=r"answered 404.*no such model.*correct url"):
            judge_at(server, tmp_path).try_out()
        server.answer = lambda *_: (200, {"text": "A"})
        with pytest.raises(RecipeError, match=r"no choices\[0\]\.message\.content: .*'text': 'A'"):
            judge_at(server, tmp_path).try_out()
    with pytest.raises(RecipeError, match="asked before the evaluation: start it, or correct url"):
        judge_at(server, tmp_path, retries=0).try_out()
    with serving(replying(lambda a, b: "[[C]]")) as server:
        for _ in range(2):
            judge_at(server, tmp_path).try_out()
        assert len(server.bodies) == 1


def test_the_key_comes_from_a_variable_and_is_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda *_: (401, {"error": "who are you?"})) as server:
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(RecipeError, match="key_env=JUDGE_KEY is not set: set it to the key"):
            judge_at(server, tmp_path, key_env="JUDGE_KEY")
        monkeypatch.setenv("JUDGE_KEY", "se\ncret")
        with pytest.raises(RecipeError, match="key_env=JUDGE_KEY holds no key") as error:
            judge_at(server, tmp_path, key_env="JUDGE_KEY")
        assert "cret" not in str(error.value)
        monkeypatch.setenv("JUDGE_KEY", " secret\n")
        with pytest.raises(RecipeError, match="set key_env to a variable with a key") as error:
            judge_at(server, tmp_path, key_env="JUDGE_KEY").try_out()
        assert "secret" not in str(error.value)
        assert server.headers[0]["Authorization"] == "Bearer secret"
        server.answer = replying(fair)
        judge_at(server, tmp_path, key_env="JUDGE_KEY").judge(BATTLES)
    kept = (tmp_path / "verdicts.jsonl").read_text(encoding="utf-8")
    assert "secret" not in kept
    assert json.loads(kept.splitlines()[0])["reply"].startswith("I thought of")
