"""The last step of the corpus job: every step by hand, independent of how input was cut up."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayrlhf.data.documents import COLUMNS, text_hash
from rayrlhf.data.mixture import Group, MixtureRules, pack_group, unique_tokens
from rayrlhf.data.tokenizer import save_tokenizer, train_tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(iter(["the cat sat"]), 300), folder, origin="test")
    return folder


def group_of(folder: Path, *documents: tuple[str, str], name: str = "train/00000") -> Group:
    """Write documents of (source, text), a batch each; the token ids are the code points."""
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    batches = []
    for number, (source, text) in enumerate(documents):
        file = f"{number:06d}-0000.arrow"
        batch = pa.record_batch(
            [
                pa.array([text_hash(text)], type=pa.binary(16)),
                pa.array([[ord(c) for c in text]], type=pa.list_(pa.int32())),
            ],
            schema=COLUMNS,
        )
        with pa.ipc.new_file(str(folder / "documents" / file), COLUMNS) as writer:
            writer.write_batch(batch)
        batches.append((source, file, 0))
    return Group(name, batches)


def pack(
    group: Group,
    folder: Path,
    tokenizer: Path | str = "",
    *,
    drop: Mapping[bytes, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    rules = {
        "work": str(folder),
        "tokenizer": str(tokenizer),
        "seed": 0,
        "row_length": 2,
        "rows_per_shard": 100,
        "packing": "stream",
        "epochs": {},
        "eos_id": EOS,
    }
    return pack_group(group, MixtureRules(**{**rules, **changes}), drop or {})


def tokens_of(folder: Path, account: dict[str, Any]) -> list[int]:
    files = [folder / "shards" / shard["file"] for shard in account["shards"]]
    tables = [pa.ipc.open_file(str(file)).read_all() for file in files]
    return [token for table in tables for row in table["tokens"].to_pylist() for token in row]


def test_duplicates_stay_once_in_the_first_source(tmp_path: Path, tokenizer: Path) -> None:
    group = group_of(tmp_path, ("b", "xy"), ("a", "xy"), ("b", "xy"), ("b", "z"), ("a", "pqr"))
    drop = {text_hash("pqr"): "held_out"}
    assert unique_tokens(group, str(tmp_path), drop) == {"a": 2, "b": 1}
    account = pack(group, tmp_path, tokenizer, drop=drop)
    a, b = account["sources"]["a"], account["sources"]["b"]
    assert (a["dropped"], a["dropped_tokens"]) == (
        {"duplicate": 0, "held_out": 1},
        {"duplicate": 0, "held_out": 3},
    )
    assert (a["kept"], a["kept_tokens"], a["in_mixture"], a["tokens"]) == (1, 2, 1, 2)
    assert (b["dropped"], b["dropped_tokens"]) == (
        {"duplicate": 2, "held_out": 0},
        {"duplicate": 4, "held_out": 0},
    )
    assert (b["kept"], b["kept_tokens"], b["in_mixture"], b["tokens"]) == (1, 1, 1, 1)
    assert list(a["examples"]) == ["held_out"]
    # x y <eos> z <eos>: two rows of two, one token left over
    assert (account["document_tokens"], account["delimiters"]) == (3, 2)
    assert (account["rows"], account["tail_tokens_dropped"], account["padding"]) == (2, 1, 0)


def test_best_fit_pads_instead_of_cutting(tmp_path: Path) -> None:
    group = group_of(tmp_path, ("a", "xyz"), ("a", "pq"))
    account = pack(group, tmp_path, row_length=5, packing="best_fit")
    assert (account["rows"], account["tail_tokens_dropped"], account["padding"]) == (2, 0, 3)
    assert tokens_of(tmp_path, account) == [*map(ord, "xyz"), EOS, EOS, *map(ord, "pq"), *[EOS] * 3]


def test_epochs_are_whole_copies_and_a_sample(tmp_path: Path) -> None:
    documents = [("a", chr(200 + i)) for i in range(10)]
    documents += [("b", chr(300 + i)) for i in range(10)]
    group = group_of(tmp_path, *documents)
    account = pack(group, tmp_path, epochs={"a": 2.5, "b": 0.3}, row_length=1)
    tokens = [token for token in tokens_of(tmp_path, account) if token]
    copies = [tokens.count(200 + i) for i in range(10)]
    assert sorted(copies) == [2] * 5 + [3] * 5
    assert sum(tokens.count(300 + i) for i in range(10)) == 3
    assert account["sources"]["a"]["in_mixture"] == 25
    assert account["sources"]["a"]["kept"] == 10
    # Held-out documents occur once, whatever the epochs and whatever is dropped elsewhere.
    held = group_of(tmp_path / "held", *documents[:10], name="test-a")
    drop = {text_hash(text): "held_out" for _, text in documents}
    account = pack(held, tmp_path / "held", epochs={"a": 2.5}, drop=drop)
    assert account["sources"]["a"]["in_mixture"] == 10


def test_the_shuffle_depends_on_the_seed_and_not_on_the_order_of_input(tmp_path: Path) -> None:
    documents = [("a", chr(200 + i)) for i in range(30)]
    orders = []
    for number, (seed, rows) in enumerate(((0, documents), (0, documents[::-1]), (1, documents))):
        folder = tmp_path / str(number)
        group = group_of(folder, *rows)
        orders.append(tokens_of(folder, pack(group, folder, seed=seed, epochs={"a": 2})))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_shards_have_at_most_the_rows_asked_for(tmp_path: Path) -> None:
    group = group_of(tmp_path, *(("a", chr(200 + i)) for i in range(10)))
    account = pack(group, tmp_path, rows_per_shard=4)
    assert [shard["rows"] for shard in account["shards"]] == [4, 4, 2]
    assert len(tokens_of(tmp_path, account)) == 20


def test_a_finished_group_is_not_packed_again(tmp_path: Path) -> None:
    account = pack(group_of(tmp_path, ("a", "xyz")), tmp_path)
    (tmp_path / "documents/000000-0000.arrow").unlink()
    assert pack(Group("train/00000", [("a", "000000-0000.arrow", 0)]), tmp_path) == account
    assert json.loads((tmp_path / "shards/train-00000.json").read_text()) == account
    assert np.array(tokens_of(tmp_path, account)).tolist() == [*map(ord, "xyz"), EOS]
