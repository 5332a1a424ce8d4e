"""Every kind of bad input of a corpus: exit 2 and its name, or named in the summary.

Tasks run in this process, one after the other; test_corpus.py does the same on a cluster.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayrlhf.cli import main
from rayrlhf.config import parse
from rayrlhf.data import corpus, inputs, job
from rayrlhf.data.tokenizer import save_tokenizer, train_tokenizer
from tests.data.inline import inline

GOOD = [f"the cat sat on mat number {n}" for n in range(40)]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "on_cluster", inline)
    monkeypatch.setattr(corpus.session, "connect", lambda recipe: None)
    monkeypatch.setattr(inputs, "MAX_RECORD_BYTES", 2**20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(iter(GOOD), 290), folder, origin="test")
    return folder


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), path)


def recipe_tree(folder: Path, tokenizer: Path, **section: Any) -> dict[str, Any]:
    (folder / "web").mkdir(exist_ok=True)
    (folder / "web/0-good.jsonl").write_bytes(lines(GOOD))
    sources = {"web": {"path": str(folder / "web")}, **section.pop("sources", {})}
    return {
        "name": "bad",
        "run_dir": str(folder / "run"),
        "tokenizer": {"path": str(tokenizer)},
        "corpus": {"row_length": 8, "sources": sources, **section},
    }


CASES: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "truncated.jsonl.gz",
        lambda path: path.write_bytes(gzip.compress(lines(GOOD))[:-9]),
        "truncated.jsonl.gz: cannot be read to its end",
    ),
    ("schema.parquet", parquet, "schema.parquet: no column text, only content"),
    (
        "long.jsonl",
        lambda path: path.write_bytes(b'{"text": "' + b"x" * 2**21 + b'"}\n' + lines(["kept"])),
        "long.jsonl:1: more than 1 MiB in one record",
    ),
    ("nul.txt", lambda path: path.write_bytes(b"a\nb\0c"), "nul.txt:2: NUL bytes"),
    (
        "nul.jsonl",
        lambda path: path.write_bytes(lines(["kept"]) + b'{"text": "a\0"}\n'),
        "nul.jsonl:2: broken JSON",
    ),
    (
        "latin1.jsonl",
        lambda path: path.write_bytes(lines(["kept"]) + '{"text": "\xe9"}\n'.encode("latin1")),
        "latin1.jsonl:2: invalid UTF-8 at byte 11",
    ),
    (
        "utf16.jsonl",
        lambda path: path.write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16")),
        "utf16.jsonl:1: invalid UTF-8 at byte 1",
    ),
    ("empty.jsonl", lambda path: path.write_bytes(b""), "empty.jsonl: empty file"),
    (
        "field.jsonl",
        lambda path: path.write_bytes(lines(["kept"]) + b'{"content": "a"}\n'),
        "field.jsonl:2: the record has no field text",
    ),
]


@pytest.mark.parametrize(("name", "make", "message"), CASES, ids=[name for name, *_ in CASES])
def test_a_bad_file_ends_the_command_with_2_or_is_left_out(
    tmp_path: Path,
    tokenizer: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    make: Callable[[Path], Any],
    message: str,
) -> None:
    tree = recipe_tree(tmp_path, tokenizer)
    make(tmp_path / "web" / name)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["corpus", str(path)]) == 2
    said = capfd.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2
    assert "Traceback" not in said

    assert main(["corpus", str(path), "corpus.on_error=skip"]) == 0
    said = capfd.readouterr().err
    assert message in said
    manifest = json.loads((tmp_path / "run/corpus/manifest.json").read_text())
    assert [message in error for error in manifest["errors"]] == [True]
    assert manifest["splits"]["train"]["sources"]["web"]["kept"] >= len(GOOD)
    assert manifest["num_errors"] >= 1


@pytest.mark.parametrize("split", ["path", "validation"])
def test_an_empty_source(
    tmp_path: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str], split: str
) -> None:
    (tmp_path / "nothing").mkdir()
    good = str(tmp_path / "web/0-good.jsonl")
    sources = {"other": {"path": good, split: str(tmp_path / "nothing")}}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(tmp_path, tokenizer, sources=sources)))
    assert main(["corpus", str(path)]) == 2
    assert "nothing: no .jsonl" in capfd.readouterr().err
    assert main(["corpus", str(path), "corpus.on_error=skip"]) == 0
    assert "corpus.sources.other: " in capfd.readouterr().err
    manifest = json.loads((tmp_path / "run/corpus/manifest.json").read_text())
    assert len(manifest["errors"]) == manifest["num_errors"] == 1
    assert list(manifest["splits"]) == ["train"]


def test_held_out_texts_that_are_gone_or_too_few_are_left_out(
    tmp_path: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.jsonl").write_bytes(lines(["short"]))
    tree = recipe_tree(tmp_path, tokenizer, row_length=16)
    tree["corpus"]["sources"]["web"]["validation"] = str(tmp_path / "held.jsonl")
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["corpus", str(path)]) == 2
    assert "validation-web has only" in capfd.readouterr().err
    assert main(["corpus", str(path), "corpus.on_error=skip"]) == 0
    assert "left out: validation-web has only" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "run/corpus/manifest.json").read_text())
    assert list(manifest["splits"]) == ["train"]
    files = {file.name for file in (tmp_path / "run/corpus").iterdir()}
    assert files == {"manifest.json", "train-00000.arrow"}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_source_that_vanishes_while_the_job_runs(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    tree = recipe_tree(tmp_path, tokenizer, on_error=on_error)
    gone = tmp_path / "web/1-gone.jsonl"
    gone.write_bytes(lines(["about to be gone"]))

    def vanishing(step: job.Step, items: Any) -> Iterator[tuple[str, job.Account]]:
        for done in inline(step, items):
            yield done
            gone.unlink(missing_ok=True)  # after the first piece

    monkeypatch.setattr(job, "on_cluster", vanishing)
    if on_error == "fail":
        with pytest.raises(Exception, match=r"1-gone\.jsonl: vanished since it was listed"):
            corpus.build_corpus(parse(tree))
        return
    folder = corpus.build_corpus(parse(tree))
    manifest = json.loads((folder / "manifest.json").read_text())
    (error,) = manifest["errors"]
    assert error.startswith(f"{gone}: vanished since it was listed")
    assert manifest["splits"]["train"]["sources"]["web"]["kept"] == len(GOOD)


def test_many_errors_of_one_file_are_one_line(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = recipe_tree(tmp_path, tokenizer, on_error="skip")
    (tmp_path / "web/1-bad.jsonl").write_bytes(b"{\n" * 50)
    (tmp_path / "web/2-bad.jsonl").write_bytes(b"{\n")
    folder = corpus.build_corpus(parse(tree))
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second = manifest["errors"]
    assert first.startswith(f"{tmp_path}/web/1-bad.jsonl:1: broken JSON")
    assert first.endswith("(and 49 more in this file)")
    assert second.startswith(f"{tmp_path}/web/2-bad.jsonl:1: broken JSON")
    assert manifest["num_errors"] == 51
    printed = capsys.readouterr().err
    assert all(error in printed for error in manifest["errors"])


def test_what_failed_goes_on_when_told_to_skip(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`on_error: fail` keeps what it finished for the run with `skip` that its message names."""
    tree = recipe_tree(tmp_path, tokenizer)
    (tmp_path / "web/1-bad.jsonl").write_bytes(b"{\n")
    monkeypatch.setattr(corpus.sources, "check_pieces", lambda pieces, config: None)
    with pytest.raises(Exception, match="or set corpus.on_error=skip to go on"):
        corpus.build_corpus(parse(tree))
    done: list[str] = []
    do = job.Step.do

    def watched(step: job.Step, name: str, item: Any, shared: Any) -> job.Account:
        done.append(f"{step.accounts.name}/{name}")
        return do(step, name, item, shared)

    monkeypatch.setattr(job.Step, "do", watched)
    tree["corpus"]["on_error"] = "skip"
    corpus.build_corpus(parse(tree))
    assert [name for name in done if name.startswith("documents")] == ["documents/000001"]
