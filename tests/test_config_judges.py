"""The sections `evaluate.models` and `evaluate.judges`: names, and what is refused at once."""

from typing import Any

import pytest

from rayrlhf.config import JudgeConfig, RecipeError, api_url, judge_key, parse

EVALUATE = {"prompts": "p", "comparisons": "c"}


def test_names_come_from_what_judges() -> None:
    named: dict[str, dict[str, Any]] = {
        "reward": {"model": "runs/x/reward/final"},
        "gold": {"model": "acme/gold"},
        "brevity": {"function": "style.py:brevity"},
        "acme-judge-7b": {"url": "http://h/v1", "llm": "acme/judge-7b"},
        "mine": {"url": "http://h/v1", "llm": "x", "name": "mine"},
    }
    for name, keys in named.items():
        assert JudgeConfig(**keys).title == name
    asked = JudgeConfig(url="http://h:1/v1?key=secret", llm="x")
    assert judge_key("evaluate.judges.2", asked) == "evaluate.judges.2.url=http://h:1/v1"


def test_the_address_of_an_api_is_that_of_its_chat_completions() -> None:
    assert api_url("http://h:8000/v1") == "http://h:8000/v1/chat/completions"
    assert api_url("http://h/v1/") == "http://h/v1/chat/completions"
    assert api_url("http://h/v1/chat/completions?v=2") == "http://h/v1/chat/completions?v=2"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judges": [{}]}, "evaluate.judges.0 has nothing that judges: give each judge one of"),
        ({"judges": [{"model": "a", "url": "http://x"}]}, "evaluate.judges.0 has model and url"),
        ({"judges": [{"function": "a:b", "llm": "x"}]}, "judges.0.llm has no effect with function"),
        ({"judges": [{"function": "a.py"}]}, "evaluate.judges.0.function=a.py: write package"),
        ({"judges": [{"url": "http://x"}]}, "evaluate.judges.0.llm is missing: name the language"),
        ({"judges": [{"url": "x/v1", "llm": "y"}]}, "evaluate.judges.0.url=x/v1: write http://"),
        ({"judges": [{"url": "http://me:secret@x", "llm": "y"}]}, "its key into the variable of"),
        ({"judges": [{"model": "x/reward/final"}]}, "has 'reward' too, and results are kept by"),
        ({"judges": [{"model": "a/x"}, {"model": "b/x"}]}, "evaluate.judges has 'x' twice"),
        (
            {"judges": [{"weight": 1}]},
            "unknown key evaluate.judges.0.weight: did you mean evaluate",
        ),
        ({"models": {"sft": "acme/x"}}, "evaluate.models has 'sft': a name is made of letters"),
        ({"models": {"a b": "acme/x"}}, "none of base, sft, dpo, ppo, ppo_ptx, the stages of"),
    ],
)
def test_what_cannot_fight_or_judge_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse({"name": "x", "model": {"path": "m"}, "evaluate": EVALUATE | changes})
    assert said in str(error.value)
    assert "secret" not in str(error.value)
