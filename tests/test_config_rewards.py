"""The section `ppo.rewards`: names, and what is refused before anything starts."""

from typing import Any

import pytest

from rayrlhf.config import RecipeError, RewardSource, parse
from rayrlhf.config.rewards import slowest_s


def test_names_come_from_what_scores() -> None:
    named = {
        "runs/x/reward/final": {"model": "runs/x/reward/final"},
        "judge": {"model": "acme/judge"},
        "final": {"model": "final"},
        "ensemble": {"members": ["a", "b"], "std_penalty": 1},
        "brevity": {"function": "style.rules:brevity"},
        "scorer.local": {"url": "http://scorer.local:8000/score?key=1"},
        "mine": {"url": "http://scorer", "name": "mine"},
    }
    for name, keys in named.items():
        assert RewardSource(**keys).title == ("reward" if name.startswith("runs") else name)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{}], "ppo.rewards.0 has nothing that scores: give each reward one of model, members"),
        ([{"model": "a", "url": "http://x"}], "ppo.rewards.0 has model and url"),
        ([{"model": "a", "timeout_s": 3}], "ppo.rewards.0.timeout_s has no effect with model"),
        ([{"function": "a:b", "retries": 1}], "ppo.rewards.0.retries has no effect with function"),
        ([{"url": "http://x", "std_penalty": 1}], "std_penalty has no effect with url"),
        ([{"members": ["a", "b"]}], "ppo.rewards.0.std_penalty is missing"),
        ([{"members": ["a", "a"], "std_penalty": 1}], "an ensemble has two models or more"),
        ([{"function": "style.py"}], "ppo.rewards.0.function=style.py: write package.module:name"),
        ([{"function": "a-b:c"}], "write package.module:name or path/to/file.py:name"),
        ([{"url": "scorer:8000"}], "ppo.rewards.0.url=scorer:8000: write http://HOST:PORT/PATH"),
        ([{"url": "http://x:99999"}], "ppo.rewards.0.url=http://x:99999: write http://"),
        ([{"url": "http://me:secret@x"}], "ppo.rewards.0.url for x has a name or password"),
        ([{"model": "a/x"}, {"model": "b/x"}], "2 of ppo.rewards have the metric reward/x"),
        ([{"model": "a", "name": "score_mean"}], "the whole score has the metric reward/score_mea"),
        (
            [{"members": ["a", "b"], "std_penalty": 1}, {"model": "x", "name": "ensemble_std"}],
            "2 of ppo.rewards have the metric reward/ensemble_std",
        ),
        ([{"model": "a", "name": "a b"}], "ppo.rewards.0.name='a b'"),
        ([{"model": "a", "weight": ".inf"}], "ppo.rewards.0.weight="),
        ([{"url": "http://x", "timeout_s": 200}], "ppo.rewards.0 may take 803.5 s"),
        ([{"function": "a:b", "timeout_s": 600}], "raise ppo.deadline_s"),
        (
            [{"model": "a", "default_score": 0}],
            "0.default_score has no effect with model",
        ),
        ([{"mod": "a"}], "unknown key ppo.rewards.0.mod: did you mean ppo.rewards.0.model?"),
    ],
)
def test_what_cannot_score_is_refused(rewards: list[dict[str, Any]], said: str) -> None:
    ppo = {"prompts": "p", "rewards": rewards}
    with pytest.raises(RecipeError) as error:
        parse({"name": "x", "model": {"path": "m"}, "ppo": ppo})
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_a_slow_endpoint_has_time_for_all_its_requests() -> None:
    url = {"url": "http://x", "timeout_s": 10, "retries": 0, "request_size": 8, "max_pending": 2}
    rewards = parse(
        {"name": "x", "model": {"path": "m"}, "ppo": {"prompts": "p", "rewards": [url]}}
    )
    assert rewards.ppo is not None
    assert slowest_s(rewards.ppo.rewards, 64) == 4 * 10  # 8 requests, two at a time
    assert slowest_s(rewards.ppo.rewards, 65) == 5 * 10
    assert slowest_s([], 64) == 0


def test_a_slow_function_has_time_for_all_its_calls() -> None:
    whole, cut = RewardSource(function="a:b"), RewardSource(function="a:b", request_size=8)
    assert slowest_s([whole], 64) == 60
    assert slowest_s([cut], 65) == 9 * 60


def test_what_is_missing_is_counted() -> None:
    plain, kind = RewardSource(function="a:b"), RewardSource(function="a:b", default_score=-1)
    assert plain.columns == (("reward/b", 1.0),)
    assert kind.columns == (("reward/b", 1.0), ("reward/b_missing", 0.0))
