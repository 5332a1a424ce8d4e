"""The section `label` of a recipe: what it needs, and what it says when something is wrong."""

from typing import Any

import pytest

from rayrlhf import config

TWO = {"sft": "a", "ppo": "b"}
BASE: dict[str, Any] = {"labellers": ["Ann", "Bob"], "items": "items.jsonl"}


def parse(**changes: Any) -> config.Recipe:
    label = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    return config.parse({"name": "toy", "label": label})


def test_a_recipe_may_hold_nothing_else() -> None:
    recipe = parse()
    assert recipe.label is not None and recipe.label.ranks and recipe.stages == ()
    arena = parse(items=None, overlap=0, arena={"models": TWO, "max_response_tokens": 8})
    assert arena.label is not None and not arena.label.ranks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labellers": []}, "nobody could sign in"),
        ({"labellers": ["Ann", "ann"]}, "names Ann twice"),
        ({"labellers": ["<b>", "Bob"]}, "begins with a letter or digit"),
        ({"labellers": ["Ann"]}, "set label.overlap=0"),
        ({"overlap_labellers": 3}, "only 2 labellers"),
        ({"overlap": 1.5}, "label.overlap=1.5"),
        ({"items": None}, "nothing to judge"),
        ({"sample": {"model": "m", "prompts": "p", "max_response_tokens": 8}}, "keep one"),
        ({"arena": {"models": {"sft": "a"}}}, "at least two"),
        ({"arena": {"models": TWO, "max_response_tokens": 128}}, "leaves no room"),
        ({"items": None, "sample": {"model": "m", "prompts": "p"}}, "leaves no room"),
        ({"database": "mysql://x/y"}, "leave it empty for SQLite"),
        ({"database": "postgresql://ann:secret@host/name"}, "holds a password"),
        ({"database": "postgresql://host/name?password=secret"}, "holds a password"),
        ({"flags": {"Bad code": "x"}}, "a code is up to 32"),
        ({"flags": {"rude": ""}}, "1 to 80 characters"),
        ({"port": 0}, "label.port=0"),
        ({"overlaps": 1}, "did you mean label.overlap"),
    ],
)
def test_errors_name_the_rule_and_the_fix(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(config.RecipeError) as caught:
        parse(**changes)
    assert says in str(caught.value)


def test_addresses_of_postgresql() -> None:
    for url in ("postgresql://ann@host/judgements", "postgresql+psycopg://host/x?sslmode=require"):
        label = parse(database=url).label
        assert label is not None and label.database == url
