"""Documents between the two passes of the corpus job: in parts, by bucket, and which to drop.

    pass 1  piece   --> parts: Arrow files with a record batch per bucket     (hash, tokens)
            bands   --> dropped: Arrow files with a record batch per bucket   (hash, held_out)
    pass 2  bucket  <-- its batch of every file

A training document's bucket follows from its hash, so equal texts meet in one bucket wherever they
lie. Held-out documents of a split and source are a group of their own, in one batch of their parts.
Batch i belongs to bucket i, so nobody has to hold an index of parts and buckets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrlhf.data.storage import replacing

DUPLICATE, HELD_OUT = "duplicate", "held_out"
NEAR_DUPLICATE, NEAR_HELD_OUT = "near_duplicate", "near_held_out"
Tokens = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]

_DOCUMENTS = pa.schema([("hash", pa.binary(16)), ("tokens", pa.list_(pa.int32()))])
_DROPPED = pa.schema([("hash", pa.binary(16)), ("held_out", pa.bool_())])


@dataclass(frozen=True)
class Part:
    """A file of documents of one source and split."""

    file: str
    source: str
    split: str


@dataclass(frozen=True)
class Shuffle:
    """All that the first pass wrote into the folder `work`."""

    work: str
    num_buckets: int
    parts: Sequence[Part]
    dropped: Sequence[str] = ()
    """Files of the search for near-duplicates."""


@dataclass(frozen=True)
class Document:
    """One document: its tokens, and the hash of its cleaned text."""

    source: str
    hash: bytes
    tokens: Tokens


@dataclass(frozen=True)
class Group:
    """Documents that become rows together: a bucket of `train`, or all of a split and source."""

    split: str
    source: str = ""
    """Empty for `train`."""
    bucket: int = 0

    @property
    def name(self) -> str:
        """Name of what the group writes."""
        return f"train-{self.bucket:05d}" if self.is_training else self.split_name

    @property
    def split_name(self) -> str:
        """Name of the split in the manifest: `train`, or `<split>-<source>`."""
        return "train" if self.is_training else f"{self.split}-{self.source}"

    @property
    def is_training(self) -> bool:
        """Held-out groups are neither mixed nor compared with others."""
        return self.split == "train"


def bucket_of(digest: bytes, num_buckets: int) -> int:
    """Return the bucket of a hash."""
    return int(_buckets_of(digest, num_buckets)[0])


def write_part(
    file: Path, hashes: Sequence[bytes], tokens: Sequence[Tokens], num_buckets: int
) -> None:
    """Write documents, sorted into a batch per bucket; within one they keep their order."""
    buckets = _buckets_of(b"".join(hashes), num_buckets)

    def batch(rows: Numbers) -> pa.RecordBatch:
        mine = [tokens[row] for row in rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(ids) for ids in mine], out=offsets[1:])
        flat = np.concatenate(mine) if mine else np.zeros(0, dtype=np.int32)
        column = pa.ListArray.from_arrays(offsets, flat)
        own = pa.array([hashes[row] for row in rows], type=pa.binary(16))
        return pa.record_batch([own, column], schema=_DOCUMENTS)

    write_batches(file, (batch(rows) for rows in _rows_by(buckets, num_buckets)), _DOCUMENTS)


def write_dropped(file: Path, found: dict[bytes, bool], num_buckets: int) -> None:
    """Write {hash: whether it is close to a held-out text}, a batch per bucket."""
    hashes = sorted(found)
    buckets = _buckets_of(b"".join(hashes), num_buckets)
    batches = (
        pa.record_batch(
            [
                pa.array([hashes[row] for row in rows], type=pa.binary(16)),
                pa.array([found[hashes[row]] for row in rows], type=pa.bool_()),
            ],
            schema=_DROPPED,
        )
        for rows in _rows_by(buckets, num_buckets)
    )
    write_batches(file, batches, _DROPPED)


def write_batches(file: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write record batches as an Arrow file, in one step."""
    with (
        replacing(file) as new,
        pa.OSFile(str(new), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def documents(shuffle: Shuffle, group: Group) -> list[Document]:
    """Return the documents of a group; their tokens stay in the mapped files."""
    found: list[Document] = []
    for part in shuffle.parts:
        if part.split != group.split or part.source != (group.source or part.source):
            continue
        batch = _batch(shuffle, f"documents/{part.file}", group.bucket)
        values = batch["tokens"].values.to_numpy()
        offsets = batch["tokens"].offsets.to_numpy()
        found += [
            Document(part.source, digest, values[start:end])
            for digest, start, end in zip(
                batch["hash"].to_pylist(), offsets[:-1], offsets[1:], strict=True
            )
        ]
    return found


def to_drop(shuffle: Shuffle, group: Group) -> dict[bytes, str]:
    """Return the hashes of a group's documents to leave out, with the reason."""
    drop: dict[bytes, str] = {}
    if not group.is_training:
        return drop
    for file in shuffle.dropped:
        batch = _batch(shuffle, f"near/{file}", group.bucket)
        for digest, held_out in zip(
            batch["hash"].to_pylist(), batch["held_out"].to_pylist(), strict=True
        ):
            if held_out or digest not in drop:
                drop[digest] = NEAR_HELD_OUT if held_out else NEAR_DUPLICATE
    for part in shuffle.parts:
        if part.split != "train":
            raw = _hash_bytes(_batch(shuffle, f"documents/{part.file}", 0))
            mine = np.flatnonzero(_buckets_of(raw, shuffle.num_buckets) == group.bucket)
            drop |= dict.fromkeys((raw[16 * i : 16 * i + 16] for i in mine.tolist()), HELD_OUT)
    return drop


def _batch(shuffle: Shuffle, file: str, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(Path(shuffle.work) / file)) as source:
        return pa.ipc.open_file(source).get_batch(number)


def _hash_bytes(batch: pa.RecordBatch) -> bytes:
    column = batch["hash"]
    start = 16 * column.offset
    return bytes(memoryview(column.buffers()[1])[start : start + 16 * len(column)])


def _buckets_of(raw: bytes, num_buckets: int) -> npt.NDArray[np.uint64]:
    """Return the bucket of every 16 bytes: (n,)."""
    first = np.frombuffer(raw, dtype=">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
    buckets: npt.NDArray[np.uint64] = first % np.uint64(num_buckets)
    return buckets


def _rows_by(keys: npt.NDArray[Any], count: int) -> list[Numbers]:
    """Return the positions of each key from 0 to count - 1, in order."""
    order = np.argsort(keys, kind="stable")
    ends = np.searchsorted(keys[order], np.arange(count, dtype=keys.dtype), side="right")
    return np.split(order, ends[:-1]) if count else []
