"""The last step of the corpus job: every step by hand, independent of how input was cut up."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayrlhf.data.buckets import (
    NEAR_DUPLICATE,
    NEAR_HELD_OUT,
    Group,
    Part,
    Shuffle,
    write_dropped,
    write_part,
)
from rayrlhf.data.documents import text_hash
from rayrlhf.data.mixture import MixtureRules, pack_group, sample_threshold, sample_tokens
from rayrlhf.data.tokenizer import save_tokenizer, train_tokenizer

EOS = 0
TRAIN = Group("train")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(iter(["the cat sat"]), 300), folder, origin="test")
    return folder


def shuffle_of(
    folder: Path,
    *documents: tuple[str, str],
    num_buckets: int = 1,
    held_out: Mapping[str, str] | None = None,
    near: Mapping[str, bool] | None = None,
) -> Shuffle:
    """Write documents of (source, text), a part each; the token ids are the code points.

    `held_out` are texts of the split `test` by their source.
    """
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    (folder / "near").mkdir(exist_ok=True)
    parts = []
    splits = [("train", num_buckets, documents), ("test", 1, tuple((held_out or {}).items()))]
    for split, buckets, rows in splits:
        for number, (source, text) in enumerate(rows):
            file = f"{split}-{number:06d}.arrow"
            ids = pa.array(map(ord, text), type=pa.int32()).to_numpy()
            write_part(folder / "documents" / file, [text_hash(text)], [ids], buckets)
            parts.append(Part(file, source, split))
    found = {text_hash(text): close for text, close in (near or {}).items()}
    write_dropped(folder / "near/00000.arrow", found, num_buckets)
    return Shuffle(str(folder), num_buckets, parts, ["00000.arrow"])


def pack(
    shuffle: Shuffle, tokenizer: Path | str = "", *, group: Group = TRAIN, **changes: Any
) -> dict[str, Any]:
    rules = {
        "tokenizer": str(tokenizer),
        "seed": 0,
        "row_length": 2,
        "rows_per_shard": 100,
        "packing": "stream",
        "epochs": {},
        "sample_below": {},
        "eos_id": EOS,
    }
    return pack_group(group, MixtureRules(**{**rules, **changes}), shuffle)


def tokens_of(folder: Path, account: dict[str, Any]) -> list[int]:
    files = [folder / "shards" / shard["file"] for shard in account["shards"]]
    tables = [pa.ipc.open_file(str(file)).read_all() for file in files]
    return [token for table in tables for row in table["tokens"].to_pylist() for token in row]


def test_duplicates_stay_once_in_the_first_source(tmp_path: Path, tokenizer: Path) -> None:
    shuffle = shuffle_of(
        tmp_path,
        *(("b", "xy"), ("a", "xy"), ("b", "xy"), ("b", "z"), ("a", "pqr")),
        held_out={"a": "pqr"},
    )
    counted = sample_tokens(TRAIN, 0, shuffle)
    assert {source: sum(bins) for source, bins in counted.items()} == {"a": 2, "b": 1}
    account = pack(shuffle, tokenizer)
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


def test_near_duplicates_go_with_their_reason(tmp_path: Path, tokenizer: Path) -> None:
    near = {"xy": False, "z": True, "not in this corpus": False}
    shuffle = shuffle_of(tmp_path, ("a", "xy"), ("a", "z"), ("a", "pqr"), near=near)
    account = pack(shuffle, tokenizer)["sources"]["a"]
    assert account["dropped"] == {NEAR_DUPLICATE: 1, NEAR_HELD_OUT: 1}
    assert account["kept_tokens"] == 3


def test_every_document_is_in_the_group_of_its_bucket(tmp_path: Path, tokenizer: Path) -> None:
    texts = [chr(200 + i) * 3 for i in range(40)]
    shuffle = shuffle_of(
        tmp_path,
        *(("a", text) for text in texts),
        num_buckets=3,
        held_out={"a": texts[0]},
        near={texts[1]: False, texts[2]: False},
    )
    groups = [Group("train", bucket=bucket) for bucket in range(3)]
    accounts = [pack(shuffle, tokenizer, group=group, row_length=1) for group in groups]
    tokens = [token for account in accounts for token in tokens_of(tmp_path, account) if token]
    assert sorted(tokens) == sorted(ord(text[0]) for text in texts[3:] for _ in range(3))
    assert all(account["rows"] for account in accounts)


def test_best_fit_pads_instead_of_cutting(tmp_path: Path) -> None:
    account = pack(
        shuffle_of(tmp_path, ("a", "xyz"), ("a", "pq")), row_length=5, packing="best_fit"
    )
    assert (account["rows"], account["tail_tokens_dropped"], account["padding"]) == (2, 0, 3)
    assert tokens_of(tmp_path, account) == [*map(ord, "xyz"), EOS, EOS, *map(ord, "pq"), *[EOS] * 3]


def test_epochs_are_whole_copies_and_a_sample(tmp_path: Path) -> None:
    documents = [("a", chr(1000 + i)) for i in range(300)]
    documents += [("b", chr(2000 + i)) for i in range(300)]
    account = pack(
        shuffle_of(tmp_path, *documents),
        epochs={"a": 2.5, "b": 0.3},
        sample_below={"a": 0.5, "b": 0.3},
        row_length=1,
    )
    tokens = [token for token in tokens_of(tmp_path, account) if token]
    copies = [tokens.count(1000 + i) for i in range(300)]
    assert set(copies) == {2, 3}
    # Binomial: 150 of 300 with a standard deviation of 9, 90 of 300 with one of 8.
    assert copies.count(3) == pytest.approx(150, abs=35)
    chosen = [i for i in range(300) if 2000 + i in tokens]
    assert len(chosen) == pytest.approx(90, abs=32)
    b = account["sources"]["b"]
    assert (b["in_mixture"], b["tokens"]) == (len(chosen), len(chosen))
    assert (b["repeated_tokens"], b["sampled_out_tokens"]) == (0, 300 - len(chosen))
    assert account["sources"]["a"]["repeated_tokens"] == sum(copies) - 300
    assert account["sources"]["a"]["kept"] == 300


def test_the_sample_is_the_same_in_any_number_of_buckets(tmp_path: Path) -> None:
    documents = [("a", chr(1000 + i)) for i in range(60)]
    found = []
    for buckets in (1, 7):
        folder = tmp_path / str(buckets)
        shuffle = shuffle_of(folder, *documents, num_buckets=buckets)
        groups = [Group("train", bucket=bucket) for bucket in range(buckets)]
        found.append(
            sorted(
                token
                for group in groups
                for token in tokens_of(
                    folder,
                    pack(
                        shuffle,
                        group=group,
                        epochs={"a": 0.4},
                        sample_below={"a": 0.4},
                        row_length=1,
                    ),
                )
            )
        )
    assert found[0] == found[1]


def test_a_sample_has_its_part_of_the_tokens_to_a_document(tmp_path: Path) -> None:
    """Few documents of very different lengths, in any number of buckets."""
    documents = [("a", chr(1000 + i) * (1 + 7 * (i % 9))) for i in range(50)]
    total = sum(len(text) for _, text in documents)
    for buckets in (1, 4):
        folder = tmp_path / str(buckets)
        shuffle = shuffle_of(folder, *documents, num_buckets=buckets)
        groups = [Group("train", bucket=bucket) for bucket in range(buckets)]
        bins = sum(
            (
                np.array(found["a"])
                for group in groups
                if (found := sample_tokens(group, 0, shuffle))
            ),
            start=np.zeros(1, dtype=int),
        )
        for part in (0.1, 0.5, 0.83):
            below = {"a": sample_threshold(bins, part)}
            mixed = [
                pack(shuffle, group=group, epochs={"a": 1 + part}, sample_below=below)
                for group in groups
            ]
            tokens = sum(account["document_tokens"] for account in mixed)
            assert tokens == pytest.approx((1 + part) * total, abs=57 / 2)


def test_where_a_sample_ends_by_hand() -> None:
    assert sample_threshold([0, 4, 0, 6], 0.0) == 0
    assert sample_threshold([0, 4, 0, 6], 0.4) == 0.5
    assert sample_threshold([0, 4, 0, 6], 0.6) == 0.5
    assert sample_threshold([0, 4, 0, 6], 0.9) == 1


def test_held_out_documents_occur_once_whatever_is_dropped_elsewhere(tmp_path: Path) -> None:
    shuffle = shuffle_of(tmp_path, ("a", "xy"), held_out={"a": "xy", "b": "z"}, near={"xy": True})
    account = pack(shuffle, group=Group("test", "a"), epochs={"a": 2.5}, row_length=1)
    assert account["split"] == "test-a"
    assert list(account["sources"]) == ["a"]
    assert account["sources"]["a"]["in_mixture"] == 1


def test_the_shuffle_depends_on_the_seed_and_not_on_the_order_of_input(tmp_path: Path) -> None:
    documents = [("a", chr(200 + i)) for i in range(30)]
    orders = []
    for number, (seed, rows) in enumerate(((0, documents), (0, documents[::-1]), (1, documents))):
        folder = tmp_path / str(number)
        account = pack(shuffle_of(folder, *rows), seed=seed, epochs={"a": 2})
        orders.append(tokens_of(folder, account))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_shards_have_at_most_the_rows_asked_for(tmp_path: Path) -> None:
    shuffle = shuffle_of(tmp_path, *(("a", chr(200 + i)) for i in range(10)))
    account = pack(shuffle, rows_per_shard=4)
    assert [shard["rows"] for shard in account["shards"]] == [4, 4, 2]
    assert len(tokens_of(tmp_path, account)) == 20
    assert json.loads(json.dumps(account)) == account
