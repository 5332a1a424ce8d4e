"""The first step of the corpus job: what a piece writes, counts, and does not do twice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayrlhf.data import buckets, documents, storage
from rayrlhf.data.buckets import Group, Part, Shuffle, bucket_of
from rayrlhf.data.cleaning import Cleaning, clean
from rayrlhf.data.documents import Piece, TextRules, text_hash, tokenize_piece
from rayrlhf.data.ngrams import Hashes, ngram_hashes
from rayrlhf.data.tokenizer import save_tokenizer, train_tokenizer

NOTHING = np.zeros(0, dtype=np.uint64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(iter(["the cat sat"]), 300), folder, origin="test")
    return folder


def piece_of(folder: Path, content: bytes, *, split: str = "train", number: int = 0) -> Piece:
    path = folder / f"{number}.jsonl"
    path.write_bytes(content)
    return Piece(number, "web", split, storage.find(path)[0], 0, len(content))


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def run(
    piece: Piece, tokenizer: Path, *, contaminated: Hashes = NOTHING, **changes: Any
) -> dict[str, Any]:
    rules = {
        "work": str(Path(piece.file.path).parent / "work"),
        "tokenizer": str(tokenizer),
        "cleaning": {"web": Cleaning(min_chars=2)},
        "num_buckets": 2,
        "bands": None,
        "contaminated_ngram": 3 if contaminated.size else 0,
        "skip_errors": False,
    }
    return tokenize_piece(piece, TextRules(**{**rules, **changes}), contaminated)  # type: ignore[arg-type]


def written(folder: Path, account: dict[str, Any]) -> dict[str, list[bytes]]:
    """Return the hashes of the documents by group."""
    parts = [Part(file, account["source"], account["split"]) for file in account["files"]]
    shuffle = Shuffle(str(folder / "work"), 2, parts)
    if account["split"] != "train":
        groups = [Group(account["split"], account["source"])]
    else:
        groups = [Group("train", bucket=bucket) for bucket in range(2)]
    return {
        group.name: [document.hash for document in buckets.documents(shuffle, group)]
        for group in groups
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a b \n", "a b"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("e\u0301", "\u00e9"),
        ("a\x00b\x1b[0m\tc\x85\x9f\x7f", "ab[0m\tc"),
        ("\U0001f469\u200d\U0001f4bb", "\U0001f469\u200d\U0001f4bb"),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_the_account_of_a_piece_by_hand(tmp_path: Path, tokenizer: Path) -> None:
    account = run(piece_of(tmp_path, lines("the cat", "x", " the\r\n", "", "the cat")), tokenizer)
    assert account["read"] == 5
    assert account["dropped"] == {"too_short": 2}
    assert account["examples"] == {"too_short": ["x"]}
    assert account["bytes"] == 7 + 3 + 7
    assert account["words"] == 2 + 1 + 2
    assert account["num_errors"] == 0
    groups = written(tmp_path, account)
    assert sorted(hash for group in groups.values() for hash in group) == sorted(
        text_hash(text) for text in ("the cat", "the cat", "the")
    )
    for group, hashes in groups.items():
        assert {bucket_of(digest, 2) for digest in hashes} <= {int(group[-5:])}


def test_held_out_documents_have_a_group_of_their_own(tmp_path: Path, tokenizer: Path) -> None:
    account = run(piece_of(tmp_path, lines("the cat"), split="test"), tokenizer)
    assert list(written(tmp_path, account)) == ["test-web"]


def test_many_documents_are_written_in_parts(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_TOKENS_PER_PART", 50)
    monkeypatch.setattr(documents, "_DOCUMENTS_PER_BATCH", 7)
    account = run(piece_of(tmp_path, lines(*(f"the cat {n}" for n in range(60)))), tokenizer)
    assert len(account["files"]) > 3
    assert sum(map(len, written(tmp_path, account).values())) == 60


def test_contaminated_documents_go(tmp_path: Path, tokenizer: Path) -> None:
    evaluation = ngram_hashes(["what is the answer"], 3)[0]
    piece = piece_of(tmp_path, lines("So what IS the -- secret?", "what is not the answer"))
    account = run(piece, tokenizer, contaminated=evaluation)
    assert account["dropped"] == {"too_short": 0, "contaminated": 1}
    assert account["examples"] == {"contaminated": ["So what IS the -- secret?"]}
    # Held-out texts are evaluation texts themselves.
    held = piece_of(tmp_path, lines("what is the"), split="validation", number=1)
    assert run(held, tokenizer, contaminated=evaluation)["dropped"]["contaminated"] == 0


BROKEN = lines("the cat") + b'{"text"\n{"txt": "a"}\n' + lines("the sat")


def test_errors_are_counted_and_the_rest_kept(tmp_path: Path, tokenizer: Path) -> None:
    account = run(piece_of(tmp_path, BROKEN), tokenizer, skip_errors=True)
    assert account["read"] == 2
    assert [error.partition(": ")[2].split()[0] for error in account["errors"]] == ["broken", "the"]
    assert account["num_errors"] == 2


def test_the_first_error_ends_the_piece(tmp_path: Path, tokenizer: Path) -> None:
    piece = piece_of(tmp_path, BROKEN)
    account = run(piece, tokenizer)
    assert account["errors"] == [
        f"{piece.file}:2: broken JSON at column 8 (Expecting ':' delimiter): every line must be "
        "one complete JSON object"
    ]
    assert account["failed"]  # so its account is not stored


def test_an_empty_file_is_an_error(tmp_path: Path, tokenizer: Path) -> None:
    account = run(piece_of(tmp_path, b""), tokenizer, skip_errors=True)
    assert "empty file" in account["errors"][0]


def test_equal_texts_meet_in_one_bucket() -> None:
    buckets = [bucket_of(text_hash(str(i)), 4) for i in range(400)]
    assert set(buckets) == {0, 1, 2, 3}
    assert bucket_of(text_hash("a"), 4) == bucket_of(text_hash("a"), 4)


def test_a_piece_survives_its_trip_through_ray_data(tmp_path: Path) -> None:
    piece = piece_of(tmp_path, lines("a"))
    assert Piece.from_json(piece.to_json()) == piece
