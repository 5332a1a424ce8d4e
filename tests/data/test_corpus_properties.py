"""The whole corpus job on texts that hypothesis makes up: accounts, bytes, kills at every point.

Tasks run in this process, one after the other; test_corpus.py does the same on a cluster.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.config import Recipe, parse
from rayrlhf.data import corpus, job, sources
from rayrlhf.data.cleaning import clean
from rayrlhf.data.rows import PackedRows
from rayrlhf.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.data.inline import inline


@pytest.fixture(scope="module", autouse=True)
def _no_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "on_cluster", inline)
        patch.setattr(corpus.session, "connect", lambda recipe: None)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(iter(["the cat sat on the mat"]), 290), folder, origin="test")
    return folder


WORDS = st.sampled_from(["the", "cat", "sat", "\u00e9", "\U0001f600", "", "\r\n", "<|endoftext|>"])
TEXTS = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=20)
DOCUMENTS = st.lists(TEXTS, min_size=1, max_size=12)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def recipe_for(folder: Path, tokenizer: Path, run: str = "run", **section: Any) -> Recipe:
    return parse(
        {
            "name": run,
            "run_dir": str(folder / run),
            "tokenizer": {"path": str(tokenizer)},
            "corpus": {"row_length": 1, "rows_per_shard": 5, **section},
        }
    )


def shards_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.arrow"))}


def texts_of(recipe: Recipe, split: str) -> Counter[str]:
    """Return the documents of a split out of its rows, which have one token each."""
    tokenizer = load_tokenizer(recipe)
    rows = PackedRows(recipe.path / "corpus", split)
    found: Counter[str] = Counter()
    document: list[int] = []
    for token in rows[range(len(rows))].reshape(-1).tolist():
        if token == tokenizer.eos_token_id:
            found[tokenizer.decode(document)] += 1
            document = []
        else:
            document.append(token)
    assert not document  # rows of one token lose no tail
    return found


@settings(max_examples=20, deadline=None)
@given(
    DOCUMENTS,
    DOCUMENTS,
    DOCUMENTS,
    st.integers(0, 2),
    st.integers(20, 200),
    st.integers(30, 400),
)
def test_every_document_and_token_is_accounted_for(
    tokenizer: Path,
    a: list[str],
    b: list[str],
    held: list[str],
    epochs: int,
    bytes_per_piece: int,
    bytes_per_bucket: int,
) -> None:
    own = "only in the training text of a"  # so that no split is empty
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(sources, "BYTES_PER_PIECE", bytes_per_piece)
        patch.setattr(corpus, "BYTES_PER_BUCKET", bytes_per_bucket)
        files = {
            "a": {
                "path": write(folder / "a.jsonl", [own, *a]),
                "validation": write(folder / "held.jsonl", ["held", *held]),
                "epochs": epochs + 1,
            },
            "b": {"path": write(folder / "b.jsonl", b)},
        }
        recipe = recipe_for(folder, tokenizer, sources=files)
        corpus.build_corpus(recipe)
        held_out = {clean(text) for text in ["held", *held]} - {""}
        in_a = {clean(text) for text in [own, *a]} - held_out - {""}
        in_b = {clean(text) for text in b} - held_out - in_a - {""}
        expected = Counter(dict.fromkeys(in_a, epochs + 1)) + Counter(dict.fromkeys(in_b, 1))
        assert texts_of(recipe, "train") == expected
        assert texts_of(recipe, "validation-a") == Counter(dict.fromkeys(held_out, 1))
        splits = json.loads((recipe.path / "corpus/manifest.json").read_text())["splits"]
        for total in splits.values():
            tokens = sum(counts["tokens"] for counts in total["sources"].values())
            assert tokens == total["document_tokens"]
            assert total["rows"] == tokens + total["delimiters"]
            for counts in total["sources"].values():
                assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
                assert counts["tokens_read"] == (
                    counts["kept_tokens"] + sum(counts["dropped_tokens"].values())
                )
        assert splits["train"]["sources"]["a"]["read"] == len(a) + 1
        assert splits["train"]["sources"]["b"]["read"] == len(b)


@settings(max_examples=15, deadline=None)
@given(DOCUMENTS, st.integers(20, 300), st.integers(1, 6), st.floats(0.3, 2.5))
def test_the_bytes_do_not_depend_on_pieces_and_files(
    tokenizer: Path, texts: list[str], bytes_per_piece: int, row_length: int, epochs: float
) -> None:
    texts = [*texts, "enough for a row or two of the corpus", "and one more document of it"]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        section = {"row_length": row_length, "near_duplicates": {"ngram": 1}}
        whole = {"a": {"path": write(folder / "whole.jsonl", texts), "epochs": epochs + 1}}
        first = corpus.build_corpus(recipe_for(folder, tokenizer, "one", sources=whole, **section))
        patch.setattr(sources, "BYTES_PER_PIECE", bytes_per_piece)
        (folder / "cut").mkdir()
        for number, text in enumerate(reversed(texts)):
            write(folder / f"cut/{number}.jsonl", [text])
        cut = {"a": {"path": str(folder / "cut"), "epochs": epochs + 1}}
        second = corpus.build_corpus(recipe_for(folder, tokenizer, "two", sources=cut, **section))
        assert shards_of(first) == shards_of(second)


class Killed(BaseException):
    """Not an Exception: nothing may catch it and go on."""


def test_a_kill_at_any_point_changes_nothing(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {n} of the cat that sat on mat {n % 7}" for n in range(12)]
    write(tmp_path / "a.jsonl", [*texts, texts[3], texts[4].replace("sat", "lay")])
    write(tmp_path / "held.jsonl", ["held out text about a dog", texts[5]])
    monkeypatch.setattr(sources, "BYTES_PER_PIECE", 400)
    monkeypatch.setattr(corpus, "BYTES_PER_BUCKET", 500)
    files = {
        "a": {
            "path": str(tmp_path / "a.jsonl"),
            "validation": str(tmp_path / "held.jsonl"),
            "weight": 1,
        }
    }
    section = {"sources": files, "near_duplicates": {"ngram": 1}, "row_length": 4}
    whole = corpus.build_corpus(recipe_for(tmp_path, tokenizer, "whole", **section))
    expected = shards_of(whole)
    manifest = (whole / "manifest.json").read_text()
    other = {**section, "row_length": 5}
    earlier = corpus.build_corpus(recipe_for(tmp_path, tokenizer, "earlier", **other))
    recipe = recipe_for(tmp_path, tokenizer, "killed", **section)
    points = 0
    for point in range(1000):
        shutil.copytree(earlier, recipe.path / "corpus")
        if not killed_at(point, recipe):
            break
        points += 1
        with pytest.MonkeyPatch.context() as patch:
            done_twice = watch(patch, finished(recipe))
            folder = corpus.build_corpus(recipe)
        assert shards_of(folder) == expected, point
        assert (folder / "manifest.json").read_text() == manifest, point
        assert not done_twice, point
        assert not (recipe.path / ".corpus").exists()
        shutil.rmtree(recipe.path)
    assert points > 30  # every account, part and shard, and every move at the end


def killed_at(point: int, recipe: Recipe) -> bool:
    """Build, and be killed at the `point`-th change of a name on the disk; False: it was built."""
    left = [point]

    def counted(change: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return change(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            corpus.build_corpus(recipe)
        except Killed:
            return True
    return False


def watch(patch: pytest.MonkeyPatch, accounts: list[Path]) -> list[str]:
    """Return a list that fills with the tasks that are done although they have an account."""
    found: list[str] = []
    do = job.Step.do

    def watched(step: job.Step, name: str, item: Any, shared: Any) -> job.Account:
        if step.accounts / f"{name}.json" in accounts:
            found.append(name)
        return do(step, name, item, shared)

    patch.setattr(job.Step, "do", watched)
    return found


def finished(recipe: Recipe) -> list[Path]:
    """Return the accounts of a job that will be gone on with."""
    work = recipe.path.resolve() / ".corpus"
    return sorted((work / "accounts").rglob("*.json")) if (work / "plan.sha256").exists() else []


def test_a_rerun_does_nothing(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"a": {"path": write(tmp_path / "a.jsonl", ["the cat", "sat"])}}
    recipe = recipe_for(tmp_path, tokenizer, sources=files)
    folder = corpus.build_corpus(recipe)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}

    def no_task(step: job.Step, items: Any) -> Any:
        raise AssertionError(f"{step.what} ran again")

    monkeypatch.setattr(job, "on_cluster", no_task)
    assert corpus.build_corpus(recipe) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    # A shard that is gone is written again.
    next(folder.glob("train-*.arrow")).unlink()
    with pytest.raises(AssertionError, match="corpus: documents ran again"):
        corpus.build_corpus(recipe)
