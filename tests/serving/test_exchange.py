"""Records in and out, who judges what, and completions of a policy, with a stub for the policy."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rayrlhf.algorithms.ranking import judged_pairs
from rayrlhf.config import Recipe, RecipeError, SampleConfig, parse
from rayrlhf.data.datasets import encode_comparisons
from rayrlhf.data.records import read_records
from rayrlhf.serving import exchange, label
from rayrlhf.serving.exchange import (
    dense_ranks,
    mid_ranks,
    ranked_records,
    voted_records,
    wanted_people,
)
from rayrlhf.serving.sampling import sample
from rayrlhf.serving.store import Battle, Judgement, Store, item_id
from tests.serving.people import items, section


def judge(store: Store, name: str, ranks: list[int] | None, item: int = 0) -> None:
    record = items(3)[item]
    found = item_id(str(record["prompt"]), list(record["responses"]))  # type: ignore[call-overload]
    flags: list[list[str]] = [["violent"], *[[] for _ in range(5)]]
    store.judge(name, Judgement(f"{name}-{item}-key-0000", found, ranks, flags, "", 1.0))


@pytest.mark.parametrize(
    ("overlap", "wanted"),
    [(0, [1] * 8), (1, [2] * 8), (0.5, [2, 1] * 4), (0.25, [2, 1, 1, 1] * 2)],
)
def test_shared_items_are_spread_evenly(overlap: float, wanted: list[int]) -> None:
    assert wanted_people(8, section(overlap=overlap)) == wanted


def test_ranks_by_hand() -> None:
    assert mid_ranks([1, 1, 3, 2]).tolist() == [1.5, 1.5, 4, 3]
    assert mid_ranks([2, 2, 2]).tolist() == [2, 2, 2]
    assert dense_ranks(np.array([1.0, 3.0, 3.0, 0.0])) == [2, 1, 1, 3]
    assert dense_ranks(np.array([0.1 + 0.2, 0.3])) == [1, 1]


def test_exported_rankings_are_what_the_reward_model_reads(
    store: Store, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    judge(store, "Ann", [1, 2, 3, 4, 5, 6])
    judge(store, "Bob", [2, 1, 1, 3, 4, 4])
    judge(store, "Cem", None)
    judge(store, "Cem", [6, 5, 4, 3, 2, 1], item=1)
    file = tmp_path / exchange.FILE
    exchange.write(file, ranked_records(store))
    first, second = read_records(file, "comparison")
    assert first["labellers"] == ["Ann", "Bob"] and first["source"] == "toy"
    assert first["single_ratings"][0] == [6.0, 4.0]  # of Bob: third of six, after a tie
    assert first["single_ratings"][5] == [1.0, 1.5]
    assert "ratings" not in first
    assert first["ranks"] == [2, 1, 3, 4, 5, 6]
    assert first["single_ranks"] == [[1, 2, 3, 4, 5, 6], [2, 1, 1, 3, 4, 4]]
    assert first["flags"][0] == ["violent", "violent"]
    assert second["ranks"] == [6, 5, 4, 3, 2, 1] and second["labellers"] == ["Cem"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    encoded = encode_comparisons([first, second], tokenizer, 60)
    pairs = judged_pairs(torch.tensor(encoded[0].ranks), encoded[0].single_ratings)
    assert len(pairs.first) == 15 and float(pairs.target.min()) >= 0.5


def test_items_that_were_judged_before_are_exported_as_they_are_judged_now(store: Store) -> None:
    judge(store, "Ann", [1, 2, 3, 4, 5, 6])
    exported = ranked_records(store)
    assert store.set_items([{**exported[0], "ratings": [0.0] * 6}], [1]) == 1
    judge(store, "Bob", [6, 5, 4, 3, 2, 1])
    (record,) = ranked_records(store)
    assert record["labellers"] == ["Ann", "Bob"] and record["notes"] == ["", ""]
    assert record["single_ranks"] == [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    assert record["flags"][0] == ["violent", "violent"] and record["source"] == "toy"
    assert "ratings" not in record


def test_exported_votes_are_comparisons_of_two(store: Store, tmp_path: Path) -> None:
    for vote in ("a", "b", "tie", "bad"):
        key = f"battle-of-vote-{vote}"
        store.add_battle("Ann", Battle(key, "Hi", ("sft", "ppo"), ("x", "y"), (1, 2)))
        store.vote("Ann", key, vote, key)
    empty = Battle("battle-of-silence", "Hi", ("sft", "ppo"), ("", "y"), (1, 2))
    store.add_battle("Ann", empty)
    store.vote("Ann", empty.key, "b", empty.key)  # no response may be empty in a record
    exchange.write(tmp_path / "votes.jsonl", voted_records(store))
    records = read_records(tmp_path / "votes.jsonl", "comparison")
    assert [record["ranks"] for record in records] == [[1, 2], [2, 1], [1, 1], [1, 1]]
    assert records[0]["single_ratings"] == [[2.0], [1.0]]
    assert records[2]["single_ratings"] == [[1.5], [1.5]]
    assert records[0]["models"] == ["sft", "ppo"]


def test_items_are_read_without_ranks(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    records = [{"prompt": "p", "responses": ["x", "y"]}, {**items(1)[0], "ranks": ["no"]}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_records(file, "item") == records
    for wrong, says in (
        ({"prompt": "p", "responses": ["x"]}, "1 responses"),
        ({"prompt": "p", "responses": ["x", ""]}, "non-empty"),
        ({"prompt": "p", "responses": list("0123456789")}, "10 responses"),
        ({"prompt": "p"}, "no field responses"),
        ({"responses": ["x", "y"]}, "no field prompt"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(RecipeError, match=says) as caught:
            read_records(file, "item")
        assert "items.jsonl:1" in str(caught.value)


def test_completions_of_other_settings_are_sampled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled: list[str] = []

    def stub(recipe: Recipe, cfg: SampleConfig, path: Path) -> None:
        sampled.append(cfg.model)
        path.write_text(cfg.model)

    monkeypatch.setattr(label, "sample_items", stub)
    recipe = parse({"name": "x", "label": {"labellers": ["ann", "bob"], "items": "x"}})
    for model, memory in (("a", 1.0), ("a", 2.0), ("b", 2.0)):
        cfg = SampleConfig(model=model, prompts="p.jsonl", memory_gib=memory)
        assert label._sampled(recipe, cfg, tmp_path).read_text() == model
    assert sampled == ["a", "b"]
    (kept,) = tmp_path.glob("items.previous-*.jsonl")
    assert kept.read_text() == "a" and "other model: " in capsys.readouterr().out


def test_completions_of_a_policy(tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stub says the same thing in every third call, and nothing to the prompt with `law`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    calls: list[int] = []

    def generate(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        calls.append(len(prompts))
        return [
            []
            if "law" in tokenizer.decode(list(ids))
            else tokenizer.encode(f"film {0 if i % 3 == 0 else seed % 10_000}")
            for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    cfg = SampleConfig(model="m", prompts="p.jsonl", num_prompts=3, num_responses=4)
    records = [{"prompt": text} for text in ("a movie", "a law", "a song")]
    found = sample(records, generate, tokenizer, cfg, room=30, seed=0)
    assert sorted(item["prompt"] for item in found) == ["a movie", "a song"]
    for item in found:
        assert 2 <= len(set(item["responses"])) == len(item["responses"]) <= 4
    assert calls[0] == 12 and 1 < len(calls) <= 3 and calls[1] < 12
    assert "1 with fewer than two are left out" in capsys.readouterr().out
    assert found == sample(records, generate, tokenizer, cfg, room=30, seed=0)
    with pytest.raises(RecipeError, match="raise the temperature"):
        sample(records[1:2], generate, tokenizer, cfg, room=30, seed=0)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    chats = sample([{"messages": turns}], generate, tokenizer, cfg, room=60, seed=0)
    assert chats[0]["messages"] == turns
    assert chats[0]["prompt"] == "user: hi\n\nassistant: hi\n\nuser: hi"
