"""Records as ids in files: the same as encoding them in memory, encoded once, counted, in a job."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.data import encoded
from rayrlhf.data.datasets import (
    encode_comparisons,
    encode_demonstrations,
    encode_prompts,
    read_records,
)
from rayrlhf.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

DEMONSTRATIONS = [
    {"prompt": "A", "response": " good film"},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"}]},
    {"prompt": "A", "response": " long" * 40},
    {"prompt": "B", "response": " so happy"},
]
COMPARISONS = [
    {"prompt": "A", "responses": [" good", " bad", " long" * 40], "ranks": [1, 2, 3]},
    {"prompt": "A", "responses": [" good", " bad"], "ranks": [1, 1]},
    {"prompt": "A", "chosen": " good", "rejected": " bad film"},
    {"messages": [{"role": "user", "content": "Q"}], "responses": ["so", "bad"], "ranks": [2, 1]},
    {"prompt": "A", "responses": [" long" * 40, " bad"], "ranks": [1, 2]},
]
PROMPTS = [{"prompt": "A film"}, {"prompt": "long " * 40}, {"prompt": "so"}]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    texts = [" good bad film long so happy A Q"] * 9
    save_tokenizer(train_tokenizer(iter(texts), 290), tmp_path / "tokenizer", origin="test")
    return parse(
        {
            "name": "toy",
            "run_dir": str(tmp_path / "run"),
            "tokenizer": {"path": str(tmp_path / "tokenizer")},
        }
    )


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_same_as_in_memory(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "d.jsonl", DEMONSTRATIONS)
    found = encoded.demonstrations(recipe, path, 24)
    assert "data: 1 of 4 demonstrations are longer than 24 tokens: left out" in (
        capsys.readouterr().out
    )
    tokenizer = load_tokenizer(recipe)
    expected = encode_demonstrations(read_records(path, "demonstration"), tokenizer, 24)
    assert list(found) == expected
    assert found[-1] == expected[-1]
    assert found[:2] == expected[:2]
    assert encoded.token_counts(found) == [len(example.ids) for example in expected]
    with pytest.raises(IndexError):
        found[len(expected)]

    path = write(tmp_path / "c.jsonl", COMPARISONS)
    ranked = encoded.comparisons(recipe, path, 24)
    in_memory = encode_comparisons(read_records(path, "comparison"), tokenizer, 24)
    assert list(ranked) == [c for c in in_memory if len(set(c.ranks)) > 1]
    assert [c.record for c in ranked] == [0, 2, 3]
    assert encoded.token_counts(ranked) == [sum(map(len, c.ids)) for c in ranked]
    assert ranked.num_sequences.tolist() == [len(c.ids) for c in ranked]
    assert ranked.key != found.key
    assert "1 of 5 comparisons rank all responses alike" in capsys.readouterr().out

    path = write(tmp_path / "p.jsonl", PROMPTS)
    assert list(encoded.prompts(recipe, path, 24)) == encode_prompts(
        [PROMPTS[0], PROMPTS[2]], tokenizer, 24
    )


def test_encoded_once_until_something_changes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    encode_piece = encoded.encode_piece

    def counted(item: str, rules: dict[str, Any]) -> dict[str, Any]:
        calls.append(item)
        return encode_piece(item, rules)

    monkeypatch.setattr(encoded, "encode_piece", counted)
    path = write(tmp_path / "d.jsonl", DEMONSTRATIONS)
    for _ in range(2):
        encoded.demonstrations(recipe, path, 24)
    assert len(calls) == 1
    encoded.demonstrations(recipe, path, 25)
    assert len(calls) == 2
    write(tmp_path / "d.jsonl", DEMONSTRATIONS[::-1])
    encoded.demonstrations(recipe, path, 24)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([*DEMONSTRATIONS, {"prompt": "A"}], r"d\.jsonl:5: .*no field response"),
        ([], "empty file"),
        ([DEMONSTRATIONS[2]], r"none of 1 demonstrations fits into 24 tokens"),
    ],
)
def test_bad_records(
    recipe: Recipe, tmp_path: Path, records: list[dict[str, Any]], message: str
) -> None:
    path = write(tmp_path / "d.jsonl", records)
    for _ in range(2):  # a failure leaves nothing that passes for finished
        with pytest.raises(RecipeError, match=message):
            encoded.demonstrations(recipe, path, 24)


def test_nothing_to_rank(recipe: Recipe, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [COMPARISONS[1]])
    with pytest.raises(RecipeError, match=r"c\.jsonl: no comparison ranks one response above"):
        encoded.comparisons(recipe, path, 24)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_over_pieces_gives_the_same(
    ray_cluster: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "d.jsonl", DEMONSTRATIONS * 30)
    in_place = list(encoded.demonstrations(recipe, path, 24))
    monkeypatch.setattr(encoded, "BYTES_IN_PLACE", 1000)
    monkeypatch.setattr(encoded, "_FORMAT", encoded._FORMAT + 1)
    in_a_job = encoded.demonstrations(recipe, path, 24)
    assert list(in_a_job) == in_place
    assert len({example.record for example in in_a_job}) == len(in_place) == 90
    write(tmp_path / "d.jsonl", [*DEMONSTRATIONS * 30, {"prompt": "A"}])
    with pytest.raises(RecipeError, match=r"d\.jsonl:121: .*no field response"):
        encoded.demonstrations(recipe, path, 24)
