"""What workers do to documents: every step by hand, and independent of how input is cut up."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data.cleaning import Cleaning, clean
from rayrlhf.data.documents import (
    COLUMNS,
    Piece,
    Rules,
    bucket_of,
    pack_group,
    read_piece,
    text_hash,
)


def rules(folder: Path, **changes: Any) -> Rules:
    return Rules(
        **{
            "seed": 0,
            "row_length": 2,
            "rows_per_shard": 100,
            "cleaning": Cleaning(min_chars=1),
            "num_buckets": 1,
            "epochs": {},
            "tokenizer": "",
            "eos_id": 0,
            "folder": str(folder),
            **changes,
        }
    )


def group(*documents: tuple[str, str, str], name: str = "train/00000") -> pa.Table:
    """Build a group of (source, text, fate); the token ids are the text's code points."""
    rows = [
        (
            name,
            source,
            text_hash(text),
            fate,
            [ord(c) for c in text] if fate == "kept" else [],
            None if fate == "kept" else text,
        )
        for source, text, fate in documents
    ]
    return pa.Table.from_pylist(
        [dict(zip(COLUMNS.names, row, strict=True)) for row in rows], schema=COLUMNS
    )


def account_of(table: pa.Table, rule: Rules) -> dict[str, Any]:
    account: dict[str, Any] = json.loads(pack_group(table, rules=rule)["account"][0])
    return account


def tokens_of(folder: Path, account: dict[str, Any]) -> list[int]:
    tables = [pa.ipc.open_file(str(folder / s["file"])).read_all() for s in account["shards"]]
    return [token for table in tables for row in table["tokens"].to_pylist() for token in row]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a b \n", "a b"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("e\u0301", "\u00e9"),
        ("a\x00b\x1b[0m\tc", "ab[0m\tc"),
        ("\U0001f469\u200d\U0001f4bb", "\U0001f469\u200d\U0001f4bb"),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=12), st.integers(1, 60))
def test_every_line_is_in_exactly_one_piece(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], step: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = path.stat().st_size
    ends = [*range(step, size, step), size]
    pieces = [
        Piece("s", "train", str(path), start, end)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    assert [text for piece in pieces for text in read_piece(piece)] == texts


def test_parquet_pieces_are_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": list("abcde"), "x": [1] * 5}), path, row_group_size=2)
    assert list(read_piece(Piece("s", "train", str(path), 1, 3))) == ["c", "d", "e"]


def test_duplicates_stay_once_in_the_first_source(tmp_path: Path) -> None:
    account = account_of(
        group(
            ("b", "xy", "kept"),
            ("a", "xy", "kept"),
            ("b", "xy", "kept"),
            ("b", "z", "kept"),
            ("b", "", "too_short"),
            ("a", "q", "held_out"),
        ),
        rules(tmp_path),
    )
    a, b = account["sources"]["a"], account["sources"]["b"]
    assert a == {
        "read": 2,
        "dropped": {"too_short": 0, "held_out": 1, "duplicate": 0},
        "examples": {"held_out": ["q"]},
        "kept": 1,
        "in_mixture": 1,
        "tokens": 2,
    }
    assert b == {
        "read": 4,
        "dropped": {"too_short": 1, "held_out": 0, "duplicate": 2},
        "examples": {},
        "kept": 1,
        "in_mixture": 1,
        "tokens": 1,
    }
    # x y <eos> z <eos>: two rows of two, one token left over
    assert (account["document_tokens"], account["delimiters"]) == (3, 2)
    assert (account["rows"], account["tail_tokens_dropped"]) == (2, 1)


def test_epochs_are_whole_copies_and_a_sample(tmp_path: Path) -> None:
    documents = [("a", chr(200 + i), "kept") for i in range(10)]
    documents += [("b", chr(300 + i), "kept") for i in range(10)]
    rule = rules(tmp_path, epochs={"a": 2.5, "b": 0.3}, row_length=1)
    account = account_of(group(*documents), rule)
    tokens = [token for token in tokens_of(tmp_path, account) if token]
    copies = [tokens.count(200 + i) for i in range(10)]
    assert sorted(copies) == [2] * 5 + [3] * 5
    assert sum(tokens.count(300 + i) for i in range(10)) == 3
    assert account["sources"]["a"]["in_mixture"] == 25
    # Held-out documents occur once, whatever the epochs.
    held = account_of(group(*documents[:10], name="test-a"), rule)
    assert held["sources"]["a"]["in_mixture"] == 10


def test_the_shuffle_depends_on_the_seed_and_not_on_the_order_of_input(tmp_path: Path) -> None:
    documents = [("a", chr(200 + i), "kept") for i in range(30)]
    orders = []
    for number, (seed, rows) in enumerate(((0, documents), (0, documents[::-1]), (1, documents))):
        (folder := tmp_path / str(number)).mkdir()
        rule = rules(folder, seed=seed, epochs={"a": 2})
        orders.append(tokens_of(folder, account_of(group(*rows), rule)))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_shards_have_at_most_the_rows_asked_for(tmp_path: Path) -> None:
    documents = [("a", chr(200 + i), "kept") for i in range(10)]
    account = account_of(group(*documents), rules(tmp_path, rows_per_shard=4))
    assert [shard["rows"] for shard in account["shards"]] == [4, 4, 2]
    assert len(tokens_of(tmp_path, account)) == 20


def test_equal_texts_meet_in_one_bucket() -> None:
    buckets = [bucket_of(text_hash(str(i)), 4) for i in range(400)]
    assert set(buckets) == {0, 1, 2, 3}
    assert bucket_of(text_hash("a"), 4) == bucket_of(text_hash("a"), 4)
