"""The real data: splits that share no text, ranks that follow the ratings, nothing lost."""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from rayrlhf.config import RecipeError
from rayrlhf.data import builtin, human_ratings
from rayrlhf.data.human_ratings import HEADERS, SOURCES, SPLITS, Snippet, similar_pairs, split
from rayrlhf.data.records import Kind, read_records

Records = dict[str, list[dict[str, Any]]]
PREFIX = "builtin:human-ratings/"


@pytest.fixture(scope="module")
def pool() -> list[str]:
    """Return the texts whose openings PPO trains on."""
    builtin.ratings_path("train")
    archive = builtin.cache_dir() / "downloads" / builtin.RATINGS_PACKAGE.file
    return [s.text for s in split(human_ratings.read_snippets(archive))["prompts"]]


@pytest.fixture(scope="module")
def ratings() -> Records:
    return {
        name: [json.loads(line) for line in builtin.ratings_path(name).open()] for name in SPLITS
    }


def snippet(number: int, text: str, *rated: int, document: str = "") -> Snippet:
    name = f"movies-{number}"
    return Snippet(name, "movies", document or name, text, rated or (0,))


def test_similar_pairs_equal_the_naive_count() -> None:
    rng = np.random.default_rng(0)
    sets = [frozenset(map(str, rng.integers(0, 9, size=rng.integers(1, 8)))) for _ in range(120)]
    for threshold in (0.5, 0.7, 1.0):
        naive = {
            (i, j)
            for i in range(120)
            for j in range(i)
            if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]) - 1e-9
        }
        found = [(max(pair), min(pair)) for pair in similar_pairs(sets, threshold)]
        assert len(found) == len(set(found))
        assert set(found) == naive


def test_near_duplicates_and_documents_stay_together() -> None:
    texts = [snippet(i, f"w{i} w{i + 1000} w{i + 2000} w{i + 3000}") for i in range(200)]
    texts += [snippet(300 + i, texts[i].text.upper() + "!!!") for i in range(200)]
    texts += [snippet(600 + i, f"v{i} v{i + 1000}", document=f"d{i // 5}") for i in range(200)]
    part_of = {s.id: name for name, part in split(texts).items() for s in part}
    assert len(part_of) == len(texts)
    assert all(part_of[f"movies-{i}"] == part_of[f"movies-{300 + i}"] for i in range(200))
    assert all(
        part_of[f"movies-{600 + i}"] == part_of[f"movies-{600 + i // 5 * 5}"] for i in range(200)
    )
    assert set(part_of.values()) == {"train", "prompts", "validation", "test"}


def test_every_text_is_in_one_split_and_shares_are_met(ratings: Records) -> None:
    ids = [record["id"] for name in SPLITS for record in ratings[name]]
    assert len(ids) == len(set(ids))
    for source, total in zip(SOURCES, (10605, 3708, 5190, 4200), strict=True):
        counts = {name: sum(r["source"] == source for r in ratings[name]) for name in SPLITS}
        for name, share in (("train", 0.84), ("validation", 0.02), ("test", 0.10)):
            assert counts[name] / total == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("name", human_ratings.HALVED)
def test_halves_of_the_comparisons_share_no_text_and_miss_none(ratings: Records, name: str) -> None:
    halves = [
        {
            text
            for record in read_records(f"{PREFIX}comparisons-{half}.{name}.jsonl", "comparison")
            for text in record["text_ids"]
        }
        for half, _ in human_ratings.HALVES
    ]
    whole = {record["id"] for record in ratings[name]}
    assert halves[0].isdisjoint(halves[1])
    assert halves[0] | halves[1] == whole
    assert len(halves[0]) / len(whole) == pytest.approx(0.5, abs=0.04)
    reviews = [{i.split("_")[0] for i in half if i.startswith("products")} for half in halves]
    assert reviews[0].isdisjoint(reviews[1])


def test_products_and_editorials_are_split_by_document(ratings: Records) -> None:
    split_of: dict[str, str] = {}
    for name in SPLITS:
        for record in ratings[name]:
            if record["source"] in ("products", "editorials"):
                assert split_of.setdefault(record["id"].split("_")[0], name) == name


@pytest.mark.parametrize("shingle", [1, 3])
def test_no_held_out_text_has_a_near_duplicate_in_training(
    ratings: Records, pool: list[str], shingle: int
) -> None:
    """Jaccard below 0.8 on words and on word 3-grams, by counting against every training text."""
    train = [shingles(text, shingle) for text in [*(r["text"] for r in ratings["train"]), *pool]]
    numbers: dict[str, int] = {}
    posting = [(numbers.setdefault(w, len(numbers)), i) for i, x in enumerate(train) for w in x]
    posting.sort()
    rows = np.array([row for _, row in posting])
    starts = np.searchsorted([number for number, _ in posting], np.arange(len(numbers) + 1))
    sizes = np.array([len(x) for x in train])
    for record in ratings["test"] + ratings["validation"]:
        held_out = shingles(record["text"], shingle)
        known = [numbers[w] for w in held_out if w in numbers]
        if not known:
            continue
        shared = np.bincount(
            np.concatenate([rows[starts[n] : starts[n + 1]] for n in known]), minlength=len(train)
        )
        jaccard = shared / (sizes + len(held_out) - shared)
        assert jaccard.max() < 0.8, (record["text"], int(jaccard.argmax()))


def shingles(text: str, size: int) -> set[str]:
    words = re.findall(r"\w+", text.lower()) or [text]
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def test_texts_are_clean_and_means_are_those_of_the_ratings(ratings: Records) -> None:
    for record in ratings["train"] + ratings["test"]:
        text = record["text"]
        assert text == " ".join(text.split())
        assert text
        assert not re.search(r"&(amp|lt|gt);|\ufeff|\ufffd", text)
        assert record["mean"] == pytest.approx(np.mean(record["ratings"]), abs=1e-6)
        assert len(record["ratings"]) >= 15
        assert all(-4 <= r <= 4 for r in record["ratings"])
    texts = {r["id"]: r["text"] for name in SPLITS for r in ratings[name]}
    assert any("\u00e9" in text for text in texts.values())  # UTF-8 was not read as Latin-1
    assert not any("\u00c3\u00a9" in text for text in texts.values())


@pytest.mark.parametrize("name", SPLITS)
def test_comparisons_hold_every_text_once_ranked_by_mean(ratings: Records, name: str) -> None:
    records = read_records(f"{PREFIX}comparisons.{name}.jsonl", "comparison")
    ids = [i for record in records for i in record["text_ids"]]
    assert sorted(ids) == sorted(r["id"] for r in ratings[name])
    of = {r["id"]: r for r in ratings[name]}
    sizes = Counter(len(record["responses"]) for record in records)
    assert set(sizes) <= set(range(4, 10))
    assert name != "train" or set(sizes) == set(range(4, 10))
    for record in records:
        means = [of[i]["mean"] for i in record["text_ids"]]
        assert record["ratings"] == means
        assert record["single_ratings"] == [of[i]["ratings"] for i in record["text_ids"]]
        assert record["responses"] == [" " + of[i]["text"] for i in record["text_ids"]]
        assert record["prompt"] == HEADERS[record["source"]]
        assert {of[i]["source"] for i in record["text_ids"]} == {record["source"]}
        assert record["ranks"] == [1 + sum(m > mine for m in means) for mine in means]
    assert any(len(set(r["ranks"])) < len(r["ranks"]) for r in records)  # ties are kept


@pytest.mark.parametrize("name", SPLITS)
def test_demonstrations_are_liked_texts_of_their_split(ratings: Records, name: str) -> None:
    of = {r["id"]: r for r in ratings[name]}
    records = read_records(f"{PREFIX}demonstrations.{name}.jsonl", "demonstration")
    expected = [i for i, r in of.items() if r["mean"] > 0 and 6 <= len(r["text"].split()) <= 60]
    assert sorted(r["id"] for r in records) == sorted(expected)
    for record in records:
        text = f"{HEADERS[record['source']]} {of[record['id']]['text']}"
        assert record["prompt"] + record["response"] == text
        opening = record["prompt"].removeprefix(HEADERS[record["source"]])
        assert 2 <= len(opening.split()) <= 5


def test_prompts_are_openings_of_texts_nobody_trained_on(ratings: Records) -> None:
    seen: set[str] = set()
    for name in SPLITS:
        records = read_records(f"{PREFIX}prompts.{name}.jsonl", "prompt")
        prompts = [record["prompt"] for record in records]
        assert len(set(prompts)) == len(prompts)
        assert not seen & set(prompts)
        seen |= set(prompts)
        of = {r["id"]: r["text"] for r in ratings[name]}
        for record in records:
            header, text = HEADERS[record["source"]], of.get(record["id"].rpartition("-")[0])
            assert 2 <= len(record["prompt"].removeprefix(header).split()) <= 5
            if name == "train":
                assert text is None  # from the pool of openings only
            else:
                assert text is not None
                assert f"{header} {text}".startswith(record["prompt"] + " ")


@pytest.mark.parametrize("source", SOURCES)
def test_corpus_documents_are_the_texts_of_their_split(ratings: Records, source: str) -> None:
    kind: Kind = "document"
    for name in SPLITS:
        texts = [r["text"] for r in read_records(f"{PREFIX}corpus.{source}.{name}.jsonl", kind)]
        expected = [
            f"{HEADERS[source]} {r['text']}" for r in ratings[name] if r["source"] == source
        ]
        assert sorted(texts) == sorted(expected)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean builtin:human-ratings/prompts\.test"):
        builtin.resolve("builtin:human-ratings/prompt.test.jsonl")
    assert builtin.resolve("some/file.jsonl") == "some/file.jsonl"
