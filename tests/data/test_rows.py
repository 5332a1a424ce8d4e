"""Rows by their number: out of local shards and out of a bucket, the same; broken copies named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.config import RecipeError
from rayrlhf.data.rows import PackedRows, check_shards, read_manifest, write_shard

ROWS = np.arange(28, dtype=np.int32).reshape(7, 4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    shards = [
        write_shard(folder / "train-00000.arrow", ROWS[:3]),
        write_shard(folder / "train-00001.arrow", ROWS[3:]),
    ]
    held = [write_shard(folder / "validation-train-00000.arrow", ROWS[:1])]
    splits = {"train": {"shards": shards}, "validation-train": {"shards": held}}
    manifest = {"row_length": 4, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_rows_over_shards(corpus: Path, prefix: str) -> None:
    packed = PackedRows(f"{prefix}{corpus}", "train")
    assert (len(packed), packed.row_length) == (7, 4)
    assert packed[[6, 0, 3, 3, 2]].tolist() == ROWS[[6, 0, 3, 3, 2]].tolist()
    assert packed[[]].shape == (0, 4)
    assert packed[[0]].dtype == torch.int64
    with pytest.raises(IndexError):
        packed[[7]]
    with pytest.raises(RecipeError, match="no rows of the split validation-x: run"):
        PackedRows(f"{prefix}{corpus}", "validation-x")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=20))
def test_a_bucket_gives_what_the_disk_gives(corpus: Path, wanted: list[int]) -> None:
    remote, local = PackedRows(f"file://{corpus}", "train"), PackedRows(corpus, "train")
    assert torch.equal(remote[wanted], local[wanted])


def test_whole_shards_pass_and_broken_ones_are_named(corpus: Path, tmp_path: Path) -> None:
    manifest = read_manifest(corpus)
    check_shards(corpus, manifest)
    check_shards(f"file://{corpus}", manifest)
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "train-00001.arrow"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[manifest["splits"]["train"]["shards"][1]["offset"]] ^= 1
    for broken in (content[: len(content) // 2], bytes(changed), None):
        path.unlink() if broken is None else path.write_bytes(broken)
        with pytest.raises(RecipeError, match=r"train-00001\.arrow: missing, cut off or changed"):
            check_shards(tmp_path, manifest)


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"manifest\.json: no corpus here"):
        read_manifest(tmp_path)
