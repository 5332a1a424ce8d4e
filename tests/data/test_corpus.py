"""The corpus stage: checks come before Ray, every token is accounted for, bytes never vary."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rayrlhf.config import Recipe, RecipeError, parse
from rayrlhf.data import corpus
from rayrlhf.data.datasets import PackedRows
from rayrlhf.data.tokenizer import load_tokenizer

WORDS = ["the", "a", "movie", "film", "good", "bad", "great", "it", "was", "never", "always"]


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 9)) + f" {number}."


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def recipe_for(folder: Path, run: str, *, seed: int = 0, **corpus_section: Any) -> Recipe:
    """Two sources; `a` in two files with a duplicate, an empty and a held-out text, and Parquet."""
    (folder / "a").mkdir(exist_ok=True)
    held = write(folder / "held.jsonl", [sentence(n) for n in range(900, 930)])
    write(folder / "a/1.jsonl", [*map(sentence, range(80)), sentence(3), "", sentence(900)])
    write(folder / "a/2.jsonl", [*map(sentence, range(80, 120)), f" {sentence(4)}\r\n"])
    pq.write_table(
        pa.table({"text": [*map(sentence, range(110, 160)), "e\u0301 \U0001f600"]}),
        folder / "b.parquet",
        row_group_size=20,
    )
    return parse(
        {
            "name": "toy",
            "run_dir": str(folder / run),
            "seed": seed,
            "tokenizer": {"vocab_size": 300},
            "corpus": {
                "row_length": 16,
                "rows_per_shard": 50,
                **corpus_section,
                "sources": {
                    "a": {"path": str(folder / "a"), "validation": held, "epochs": 2},
                    "b": {"path": str(folder / "b.parquet"), "test": held, "epochs": 0.5},
                },
            },
        }
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty file"),
        (b'{"text": "a"}\n{"txt": "b"}\n', r"bad\.jsonl:2: .*no field text"),
        (b'{"text": "a"}\n{"text"\n', r"bad\.jsonl:2: broken JSON"),
        (b'{"text": "\xff"}\n', r"bad\.jsonl:1: invalid UTF-8"),
    ],
)
def test_bad_input_is_found_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    def no_ray(recipe: Recipe) -> None:
        raise AssertionError("Ray was started before the input was checked")

    monkeypatch.setattr(corpus.session, "connect", no_ray)
    good = write(tmp_path / "good.jsonl", ["a"])
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_bytes(content)
    recipe = parse(
        {
            "name": "x",
            "run_dir": str(tmp_path / "run"),
            "corpus": {"sources": {"a": {"path": good, "test": str(bad)}}},
        }
    )
    with pytest.raises(RecipeError, match=message):
        corpus.build_corpus(recipe)


def test_large_files_are_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BYTES_PER_PIECE", 1000)
    recipe = recipe_for(tmp_path, "run")
    assert recipe.corpus is not None
    pieces = corpus.pieces_of(corpus.check_inputs(recipe.corpus))
    own = [p for p in pieces if p.file.endswith("1.jsonl")]
    assert [p.start for p in own] == [0, *(p.end for p in own[:-1])]
    assert own[-1].end == (tmp_path / "a/1.jsonl").stat().st_size
    assert [(p.start, p.end) for p in pieces if p.file.endswith("parquet")] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        recipe = recipe_for(tmp_path, "run")
        folder = corpus.build_corpus(recipe)
        manifest = json.loads((folder / "manifest.json").read_text())
        _check_manifest(manifest)
        _check_rows(recipe, folder, manifest)
        # Other pieces, blocks and order of tasks: the same bytes. Another seed: other bytes.
        monkeypatch.setattr(corpus, "BYTES_PER_PIECE", 1000)
        again = corpus.build_corpus(recipe_for(tmp_path, "again"))
        assert _bytes(again) == _bytes(folder)
        other = corpus.build_corpus(recipe_for(tmp_path, "other", seed=1))
        assert _bytes(other)["train-00000.arrow"] != _bytes(folder)["train-00000.arrow"]
        # More buckets: other shards, the same documents.
        monkeypatch.setattr(corpus, "BYTES_PER_BUCKET", 3000)
        buckets = corpus.build_corpus(recipe_for(tmp_path, "again"))
        more = json.loads((buckets / "manifest.json").read_text())["splits"]["train"]
        assert more["sources"]["a"] == manifest["splits"]["train"]["sources"]["a"]
        assert [p.name for p in sorted((tmp_path / "again").iterdir())] == ["corpus", "tokenizer"]
        with pytest.raises(RecipeError, match=r"less than one row of corpus\.row_length=100000"):
            corpus.build_corpus(recipe_for(tmp_path, "run", row_length=100_000))
        assert _bytes(folder)  # a failed run leaves the last result alone
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_documents_that_rules_drop_are_counted_and_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = "Der Film ist am Anfang langsam, aber das Ende lohnt sich f\u00fcr alle Zuschauer."
    write(
        tmp_path / "pages.jsonl",
        [f"{sentence(n)} Please write to me{n}@example.org today." for n in range(40)]
        + [
            german,
            "Nobody in the audience could say why the actor said lorem ipsum in this film.",
            "Too short.",
        ],
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        recipe = parse(
            {
                "name": "toy",
                "run_dir": str(tmp_path / "run"),
                "tokenizer": {"vocab_size": 300},
                "corpus": {
                    "row_length": 16,
                    "min_chars": 20,
                    "languages": ["en"],
                    "edits": ["scrub_email"],
                    "filters": ["c4_lorem_ipsum", "c4_curly_bracket"],
                    "sources": {"pages": {"path": str(tmp_path / "pages.jsonl")}},
                },
            }
        )
        folder = corpus.build_corpus(recipe)
    finally:
        ray.shutdown()
    manifest = json.loads((folder / "manifest.json").read_text())
    pages = manifest["splits"]["train"]["sources"]["pages"]
    dropped = {reason: count for reason, count in pages["dropped"].items() if count}
    assert dropped == {"too_short": 1, "language": 1, "c4_lorem_ipsum": 1}
    assert pages["read"] == 43 == pages["kept"] + sum(dropped.values())
    assert pages["examples"]["language"] == [german]
    text = load_tokenizer(recipe).decode(
        PackedRows(folder, "train")[range(len(PackedRows(folder, "train")))].reshape(-1).tolist()
    )
    assert "write to <email> today." in text
    assert not {"me3@example.org", "lorem", "Anfang"} & set(text.split())
    table = capsys.readouterr().out
    assert "- c4 lorem ipsum" in table
    assert "- c4 curly bracket" not in table  # dropped nothing


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.arrow"))}


def _check_manifest(manifest: dict[str, Any]) -> None:
    train = manifest["splits"]["train"]
    assert train["sources"]["a"]["read"] == 124
    assert train["sources"]["a"]["dropped"] == {"too_short": 1, "held_out": 1, "duplicate": 2}
    assert train["sources"]["a"]["in_mixture"] == 2 * 120
    # b shares ten texts with a, which come first by name; half of the other 41 is 20.
    assert train["sources"]["b"]["dropped"]["duplicate"] == 10
    assert train["sources"]["b"]["in_mixture"] == 20
    assert manifest["splits"]["validation-a"]["sources"]["a"]["in_mixture"] == 30
    assert manifest["splits"]["test-b"]["sources"]["b"]["in_mixture"] == 30
    for split in manifest["splits"].values():
        assert split["document_tokens"] + split["delimiters"] == (
            split["rows"] * manifest["row_length"] + split["tail_tokens_dropped"]
        )
        assert split["document_tokens"] == sum(s["tokens"] for s in split["sources"].values())
        assert split["rows"] == sum(shard["rows"] for shard in split["shards"])
    assert len(manifest["inputs"]) == 4


def _check_rows(recipe: Recipe, folder: Path, manifest: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(recipe)
    rows = PackedRows(folder, "train")
    assert len(rows) == manifest["splits"]["train"]["rows"]
    assert sorted(p.name for p in folder.glob("train-*")) == [
        f"train-{n:05d}.arrow" for n in range((len(rows) + 49) // 50)
    ]
    text = tokenizer.decode(rows[range(len(rows))].reshape(-1).tolist())
    documents = text.split("<|endoftext|>")[:-1]  # the last may have lost its end
    expected = {sentence(n) for n in range(160)} | {"\u00e9 \U0001f600"}
    assert set(documents) <= expected
    assert {sentence(n) for n in range(120)} - set(documents) <= {text.split("<|endoftext|>")[-1]}
