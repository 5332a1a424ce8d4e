"""Rounds of feedback without training: their recipes, judges, files, and accuracies by hand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf import lineage
from rayrlhf.config import JudgeConfig, Recipe, RecipeError, RoundsConfig, parse
from rayrlhf.data.records import read_records
from rayrlhf.data.tokenizer import load_tokenizer
from rayrlhf.evaluation.llm_judge import Battle
from rayrlhf.rounds import collect
from rayrlhf.rounds.accuracy import compare, scores_of
from rayrlhf.rounds.folders import (
    COMPARISONS,
    HELD_OUT,
    JUDGED,
    SAMPLES,
    open_folder,
    policy_before,
    reward_model_before,
    round_recipe,
)
from rayrlhf.run_dir import PeopleNeeded
from rayrlhf.serving import exchange
from rayrlhf.serving.database import Database
from rayrlhf.serving.store import Judgement, Store, item_id

ITEMS = [
    {"prompt": f"Review {i}:", "responses": [" It is good.", " It is bad.", f" A film {i}."]}
    for i in range(10)
]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Any:
    """Return make(**rounds): a recipe in a run directory with tokenizer and base comparisons."""
    base = tmp_path / "base.jsonl"
    base.write_text(json.dumps({"prompt": "A", "responses": [" b", " c"], "ranks": [1, 2]}) + "\n")

    def recipe(label: dict[str, Any] | None = None, **rounds: Any) -> Recipe:
        made = parse(
            {
                "name": "x",
                "seed": 3,
                "run_dir": str(tmp_path / "run"),
                "tokenizer": {"path": str(tiny_model)},
                "model": {"path": str(tiny_model), "max_length": 64},
                "reward": {"train": str(base), "gold": {"train": "gold.jsonl"}},
                "ppo": {"prompts": "prompts.jsonl"},
                "rounds": {"num_rounds": 2, "judge": "vader", **rounds},
                "label": label,
            }
        )
        load_tokenizer(made)
        return made

    return recipe


def first_round(recipe: Recipe) -> Recipe:
    """Open the folder of round 1 with samples in it."""
    round_ = round_recipe(recipe, 1)
    open_folder(recipe, round_)
    exchange.write(round_.path / SAMPLES, ITEMS)
    return round_


def test_a_number_is_short_for_the_section() -> None:
    assert RoundsConfig.model_validate(2) == RoundsConfig(num_rounds=2)
    assert RoundsConfig(num_rounds=2).judge == "people"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": {"num_rounds": 1, "judge": "ann"}}, "rounds.judge=ann: it is people, vader"),
        ({"rounds": {"num_rounds": 1, "judge": {}}}, "rounds.judge has nothing that judges"),
        (
            {"rounds": {"num_rounds": 1, "judge": {"url": "http://h/v1"}}},
            "rounds.judge.llm is missing",
        ),
        ({"rounds": 1}, "the recipe has no section label: add label.labellers"),
        ({"rounds": 0}, "rounds"),
        ({"reward": None}, "the recipe has no section reward"),
        (
            {"ppo": {"prompts": "p.jsonl", "rewards": [{"function": "a:b"}]}},
            "ppo.rewards names others",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    tree = {
        "name": "x",
        "tokenizer": {"path": "t"},
        "model": {"path": "m"},
        "reward": {"train": "c.jsonl"},
        "ppo": {"prompts": "p.jsonl"},
        "rounds": {"num_rounds": 1, "judge": "vader"},
    }
    with pytest.raises(RecipeError, match=said):
        parse({**tree, **changes})
    assert parse({**tree, "rounds": 2, "label": {"labellers": ["ann", "bob"]}}).rounds is not None


def test_a_round_is_the_recipe_in_a_folder_of_its_own(make: Any) -> None:
    recipe = make()
    run = recipe.path
    one, two = round_recipe(recipe, 1), round_recipe(recipe, 2)
    assert one.stages == two.stages == ("reward", "ppo")
    assert two.path == run / "rounds" / "02" and two.seed != one.seed != recipe.seed
    assert one.reward.train == str(run / "rounds/01" / COMPARISONS) and one.reward.gold is None
    assert one.ppo.init == policy_before(recipe, 1) == str(run / "ppo/final")
    assert two.ppo.init == policy_before(recipe, 2) == str(run / "rounds/01/ppo/final")
    assert reward_model_before(recipe, 1) == run / "reward/final"
    assert reward_model_before(recipe, 2) == run / "rounds/01/reward/final"
    # The reference, and what the reward model starts from, are those of the run.
    assert lineage.start_model(two, "ppo") == lineage.start_model(recipe, "ppo")
    lineage.write_json(run / "lineage.json", {"ppo": {"a": 1}, "sft": {"b": 2}})
    (run / "sft").mkdir()
    for _ in range(2):  # again, where a run goes on
        open_folder(recipe, two)
    assert (two.path / "sft").resolve() == (run / "sft").resolve()
    assert (two.path / "tokenizer/tokenizer.json").is_file()
    assert lineage.load(two) == {"sft": {"b": 2}}
    assert parse(json.loads(two.model_dump_json())).path == two.path


def test_rules_judge_and_a_share_is_held_out(make: Any) -> None:
    recipe = make(held_out=0.3)
    round_ = first_round(recipe)
    tokenizer = load_tokenizer(recipe)
    collect.judge(recipe, round_, tokenizer)
    judged, held_out = (
        read_records(round_.path / name, "comparison") for name in (JUDGED, HELD_OUT)
    )
    assert len(judged) + len(held_out) == 10 and 1 <= len(held_out) <= 6
    for record in judged + held_out:
        assert record["ranks"] == [1, 3, 2]  # good, bad, neither
        # As people's on the page: K is best, and nothing compares with other prompts.
        assert record["single_ratings"] == [[3.0], [1.0], [2.0]] and "ratings" not in record
        assert record["source"] == "01"
    assert not {r["prompt"] for r in judged} & {r["prompt"] for r in held_out}

    num = len(judged)
    assert collect.gather(recipe, [round_.path]) == num + 1  # with the one of reward.train
    assert len(read_records(round_.path / COMPARISONS, "comparison")) == num + 1
    exchange.write(round_.path / SAMPLES, [])  # they are not judged a second time
    collect.judge(recipe, round_, tokenizer)
    second = round_recipe(recipe, 2)
    open_folder(recipe, second)
    exchange.write(second.path / SAMPLES, ITEMS)
    collect.judge(recipe, second, tokenizer)
    again = read_records(second.path / HELD_OUT, "comparison")
    assert [r["prompt"] for r in again] == [r["prompt"] for r in held_out]  # in every round
    assert collect.gather(recipe, [round_.path, second.path]) == 1 + 2 * num
    names = [r.get("source") for r in read_records(second.path / COMPARISONS, "comparison")]
    assert names == [None, *["01"] * num, *["02"] * num]


def test_a_function_judges(make: Any, tmp_path: Path) -> None:
    (tmp_path / "taste.py").write_text(
        "def shortest(prompts, responses):\n"
        "    assert all(p.startswith('Review') for p in prompts)\n"
        "    return [-len(r) for r in responses]\n"
    )
    recipe = make(judge={"function": f"{tmp_path / 'taste.py'}:shortest"})
    round_ = first_round(recipe)
    collect.judge(recipe, round_, load_tokenizer(recipe))
    (record,) = {tuple(r["ranks"]) for r in read_records(round_.path / JUDGED, "comparison")}
    assert record == (3, 2, 1)  # 12, 11 and 10 characters


def test_chats_are_judged_and_kept_as_chats(make: Any) -> None:
    recipe = make()
    round_ = first_round(recipe)
    turns = [{"role": role, "content": "Hi."} for role in ("user", "assistant", "user")]
    said = ["Great", "Awful"]  # no word of the prompt's last one
    items = [{"prompt": f"p{n}", "messages": turns, "responses": said} for n in range(4)]
    exchange.write(round_.path / SAMPLES, items)
    tokenizer = load_tokenizer(recipe)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    collect.judge(recipe, round_, tokenizer)
    for record in read_records(round_.path / JUDGED, "comparison"):
        assert (record["messages"], record["ranks"]) == (turns, [1, 2])


def test_equal_answers_are_left_out_and_a_round_needs_some(make: Any) -> None:
    recipe = make()
    round_ = first_round(recipe)
    same = [{"prompt": "Review:", "responses": [" A film.", " A film 2."]}] * 4
    exchange.write(round_.path / SAMPLES, same)
    with pytest.raises(RecipeError, match="of 4 prompts 0 have answers of which one is better"):
        collect.judge(recipe, round_, load_tokenizer(recipe))
    assert not (round_.path / HELD_OUT).exists()


@dataclass
class LikesFirst:
    """A language model that likes the word `good`, cannot decide on films, and else the order."""

    asked: list[Battle]

    def judge(self, battles: list[Battle]) -> list[tuple[str | None, str | None]]:
        self.asked += battles
        found: list[tuple[str | None, str | None]] = []
        for battle in battles:
            if "good" in battle.first:
                found.append(("A", "B"))  # in both orders
            elif "good" in battle.second:
                found.append(("B", "A"))
            else:
                found.append((None, "A"))
        return found


def test_a_language_model_sees_all_pairs_and_points_are_wins() -> None:
    judge = LikesFirst([])
    points = collect._wins(ITEMS[:2], judge)  # type: ignore[arg-type]
    assert len(judge.asked) == 2 * 3
    assert [given.tolist() for given in points] == [[2.0, 0.5, 0.5]] * 2


def test_people_are_waited_for(make: Any) -> None:
    recipe = make(label={"labellers": ["ann"], "overlap": 0}, judge="people")
    round_ = first_round(recipe)
    assert round_.label.items == str(round_.path / SAMPLES)
    tokenizer = load_tokenizer(recipe)
    with pytest.raises(
        PeopleNeeded, match="0 of 10 prompts are judged. `rayrlhf label .*01/recipe"
    ):
        collect.judge(recipe, round_, tokenizer)
    database = Database("", round_.path / "label")
    store = Store(database, claim_s=60)
    other = [{"prompt": "of another round", "responses": ["a", "b", "c"]}]
    store.set_items(other, [1])
    item = store.next_item("ann")
    assert item is not None
    store.judge("ann", Judgement("other", item.id, [1, 2, 3], [[]] * 3))
    store.set_items(read_records(round_.label.items, "item"), [1] * 10)
    for number in range(10):
        item = store.next_item("ann")
        assert item is not None
        ranks = None if number == 4 else [2, 1, 3]  # one is skipped
        store.judge("ann", Judgement(f"key-{number}", item.id, ranks, [[]] * 3, ""))
        if number == 8:
            with pytest.raises(PeopleNeeded, match="9 of 10"):
                collect.judge(recipe, round_, tokenizer)
    database.close()
    collect.judge(recipe, round_, tokenizer)
    judged = read_records(round_.path / JUDGED, "comparison")
    held_out = read_records(round_.path / HELD_OUT, "comparison")
    assert len(judged) + len(held_out) == 9
    assert all(r["ranks"] == [2, 1, 3] and r["labellers"] == ["ann"] for r in judged)


def test_people_who_share_items_are_waited_for(make: Any) -> None:
    """A skip leaves an item to the others, and half of the items want two people."""
    recipe = make(label={"labellers": ["ann", "bob"], "overlap": 0.5}, judge="people")
    round_ = first_round(recipe)
    tokenizer = load_tokenizer(recipe)
    with pytest.raises(PeopleNeeded, match="0 of 10"):
        collect.judge(recipe, round_, tokenizer)
    database = Database("", round_.path / "label")
    store = Store(database, claim_s=60)
    items = read_records(round_.label.items, "item")
    store.set_items(items, exchange.wanted_people(10, round_.label))
    for number, item in enumerate(items):
        name = item_id(item["prompt"], item["responses"])
        ranks = None if number in (1, 3) else [2, 1, 3]
        store.judge("ann", Judgement(f"ann-{number}", name, ranks, [[]] * 3))
    with pytest.raises(PeopleNeeded, match="3 of 10"):
        collect.judge(recipe, round_, tokenizer)
    while (item := store.next_item("bob")) is not None:
        ranks = None if item.prompt == items[3]["prompt"] else [2, 1, 3]  # nobody likes this one
        store.judge("bob", Judgement(f"bob-{item.id}", item.id, ranks, [[]] * 3))
    database.close()
    collect.judge(recipe, round_, tokenizer)
    judged = read_records(round_.path / JUDGED, "comparison")
    judged += read_records(round_.path / HELD_OUT, "comparison")
    assert sorted(len(record["labellers"]) for record in judged) == [1] * 4 + [2] * 5


def test_accuracy_counts_pairs_and_intervals_draw_records() -> None:
    records = [
        {"responses": ["a", "b", "c"], "ranks": [1, 2, 2]},  # two pairs
        {"responses": ["a", "b"], "ranks": [2, 1]},
    ]
    before = [np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0])]  # wrong, half; right
    after = [np.array([2.0, 1.0, 0.0]), np.array([0.0, 1.0])]
    found = compare(records, before, after, seed=0)
    assert found["num_pairs"] == 3
    assert found["pair_accuracy_before"]["value"] == pytest.approx(0.5)
    assert found["pair_accuracy"]["value"] == 1.0
    gain = found["pair_accuracy_gain"]
    assert gain["value"] == pytest.approx(0.5) and 0 <= gain["low"] <= 0.5 <= gain["high"] <= 0.75


def test_scores_come_in_the_order_of_the_responses(make: Any, tmp_path: Path) -> None:
    from rayrlhf.models.scalar_head import ScalarHeadModel

    recipe = make()
    ScalarHeadModel.from_causal_lm(recipe.model.path, seed=1).save_pretrained(str(tmp_path / "rm"))
    tokenizer = load_tokenizer(recipe)
    together = scores_of(tmp_path / "rm", ITEMS, tokenizer, 512)
    assert [len(scores) for scores in together] == [3] * 10
    turned = [{**item, "responses": item["responses"][::-1]} for item in ITEMS]
    for scores, other in zip(
        together, scores_of(tmp_path / "rm", turned, tokenizer, 64), strict=True
    ):
        np.testing.assert_allclose(scores, other[::-1], atol=1e-5)


def test_an_unknown_judge_of_a_section_is_named() -> None:
    judge = JudgeConfig(function="a.py:f")
    assert RoundsConfig(num_rounds=1, judge=judge).judge == judge
