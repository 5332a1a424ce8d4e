"""Near-duplicates in a whole corpus: MinHash and locality-sensitive hashing as a job over files.

    documents --MinHash--> bands --group by band--> candidates --exact Jaccard--> hashes to drop

Two documents with Jaccard index J of their word n-grams share a band of r rows with probability
J^r, and one of b bands with 1 - (1 - J^r)^b (Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, section 3.4). Candidates are compared by their n-grams themselves, so nothing is dropped
for a collision of hashes. Of two near-duplicates the one that comes later in the order of hashes
goes, but never a held-out one; what is dropped doesn't depend on how the input was cut up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrlhf.data.buckets import write_batches, write_dropped
from rayrlhf.data.ngrams import Hashes, jaccard, ngram_hashes

MAX_COMPARED = 32
"""Of a band's documents, each is compared with so many that come before it."""
_SEED = 42
_KEYS = pa.schema([("key", pa.uint64()), ("row", pa.uint32())])
_NGRAMS = pa.schema([("hash", pa.binary(16)), ("ngrams", pa.large_list(pa.uint64()))])
_NGRAMS_PER_PART = 2**23
"""Hashes that a worker holds before it writes them: 64 MiB."""


@dataclass(frozen=True)
class Bands:
    """How documents are hashed and compared."""

    threshold: float
    ngram: int
    num_bands: int
    rows_per_band: int
    num_partitions: int
    """Tasks that the bands are divided among."""


def signatures(ngrams: Sequence[Hashes], bands: Bands) -> Hashes:
    """Return a 64-bit key per document and band: (n, num_bands); equal keys, equal bands."""
    from rensa import RMinHash

    num_perm = bands.num_bands * bands.rows_per_band
    offsets = np.concatenate([[0], np.cumsum([len(hashes) for hashes in ngrams])])
    flat = np.concatenate(ngrams) if ngrams else np.zeros(0, dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        flat, offsets.tolist(), num_perm=num_perm, seed=_SEED
    )
    rows = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(ngrams), num_perm)
    keys = np.empty((len(ngrams), bands.num_bands), dtype=np.uint64)  # (n, b)
    for band in range(bands.num_bands):
        mixed = np.full(len(ngrams), band + 1, dtype=np.uint64)
        for row in rows[:, band * bands.rows_per_band : (band + 1) * bands.rows_per_band].T:
            mixed = (mixed ^ row) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(31)
        keys[:, band] = mixed
    return keys


class Writer:
    """Writes the n-grams and the band keys of one piece's documents, in parts."""

    def __init__(self, folder: Path, name: str, held_out: bool, bands: Bands) -> None:
        self._folder, self._name, self._held_out, self._bands = folder, name, held_out, bands
        self._hashes: list[bytes] = []
        self._ngrams: list[Hashes] = []
        self._size = 0
        self._parts: list[dict[str, Any]] = []

    def add(self, texts: Sequence[str], hashes: Sequence[bytes]) -> None:
        """Take documents; those without words have no near-duplicates."""
        for digest, ngrams in zip(hashes, ngram_hashes(texts, self._bands.ngram), strict=True):
            if ngrams.size:
                self._hashes.append(digest)
                self._ngrams.append(ngrams)
                self._size += ngrams.size
        if self._size >= _NGRAMS_PER_PART:
            self._write()

    def finish(self) -> list[dict[str, Any]]:
        """Write what is left; returns the names of all files."""
        if self._hashes:
            self._write()
        return self._parts

    def _write(self) -> None:
        name = f"{self._name}-{len(self._parts):04d}"
        offsets = np.zeros(len(self._hashes) + 1, dtype=np.int64)
        np.cumsum([len(ngrams) for ngrams in self._ngrams], out=offsets[1:])
        column = pa.LargeListArray.from_arrays(offsets, np.concatenate(self._ngrams))
        documents = pa.record_batch(
            [pa.array(self._hashes, type=pa.binary(16)), column], schema=_NGRAMS
        )
        write_batches(self._folder / f"{name}.ngrams.arrow", [documents], _NGRAMS)
        keys = signatures(self._ngrams, self._bands)
        rows = np.repeat(np.arange(len(keys), dtype=np.uint32), self._bands.num_bands)
        flat = keys.reshape(-1)
        count = self._bands.num_partitions
        partition = flat % np.uint64(count)
        order = np.argsort(partition, kind="stable")
        ends = np.searchsorted(partition[order], np.arange(count, dtype=np.uint64), side="right")
        batches = (
            pa.record_batch([flat[part], rows[part]], schema=_KEYS)
            for part in np.split(order, ends[:-1])
        )
        write_batches(self._folder / f"{name}.bands.arrow", batches, _KEYS)
        self._parts.append(
            {
                "documents": f"{name}.ngrams.arrow",
                "bands": f"{name}.bands.arrow",
                "held_out": self._held_out,
            }
        )
        self._hashes, self._ngrams, self._size = [], [], 0


@dataclass(frozen=True)
class Search:
    """What the tasks of the search share."""

    work: str
    """Folder of the job."""
    threshold: float
    num_buckets: int
    """Of the training documents, which what is found is written by."""


def search_partition(
    partition: int, rules: Search, parts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write which documents a partition's bands find; return how many.

    `parts` is what `Writer.finish` returned for all pieces.
    """
    folder = Path(rules.work) / "near"
    folder.mkdir(parents=True, exist_ok=True)
    found = find_in_partition(partition, parts, Path(rules.work) / "documents", rules.threshold)
    file = f"{partition:05d}.arrow"
    write_dropped(folder / file, found, rules.num_buckets)
    return {"file": file, "found": len(found)}


def find_in_partition(
    partition: int, parts: Sequence[Mapping[str, Any]], folder: Path, threshold: float
) -> dict[bytes, bool]:
    """Return the hashes of near-duplicates by a band of `partition`: True close to a held-out text.

    `parts` are the accounts of `Writer.finish`.
    """
    keys, places = _candidates(partition, parts, folder)
    order = np.lexsort((places[:, 1], places[:, 0], keys))
    keys, places = keys[order], places[order]
    # Runs of equal keys with at least two documents.
    edges = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1, append=keys[-1:] + 1))
    documents = _Documents(parts, folder)
    compared: dict[tuple[bytes, bytes], bool] = {}
    found: dict[bytes, bool] = {}
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        if end - begin < 2:
            continue
        run = sorted({documents.order(int(part), int(row)) for part, row in places[begin:end]})
        for later in range(1, len(run)):
            is_training, digest, *place = run[later]
            if not is_training:
                continue  # held-out documents, which come first, stay
            for other_is_training, other, *other_place in run[: min(later, MAX_COMPARED)]:
                if other == digest or found.get(digest):
                    continue
                pair = (other, digest)
                if pair not in compared:
                    index = jaccard(documents.ngrams(*place), documents.ngrams(*other_place))
                    compared[pair] = index >= threshold
                if compared[pair]:
                    found[digest] = not other_is_training
    return found


def _candidates(
    partition: int, parts: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Return the keys of a partition (n,), and (part, row) of their documents (n, 2)."""
    keys, places = [np.zeros(0, dtype=np.uint64)], [np.zeros((0, 2), dtype=np.int64)]
    for number, part in enumerate(parts):
        with pa.memory_map(str(folder / part["bands"])) as source:
            batch = pa.ipc.open_file(source).get_batch(partition)
            keys.append(batch["key"].to_numpy().copy())
            rows = batch["row"].to_numpy().astype(np.int64)
        places.append(np.stack([np.full(len(rows), number), rows], axis=1))
    return np.concatenate(keys), np.concatenate(places)


class _Documents:
    """Random access to the n-grams of all parts."""

    def __init__(self, parts: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self._parts, self._folder = parts, folder
        self._open: dict[int, pa.RecordBatch] = {}

    def order(self, part: int, row: int) -> tuple[int, bytes, int, int]:
        """Return the sort key of a document, held-out ones first; ends with its place."""
        is_training = not self._parts[part]["held_out"]
        return (int(is_training), self._batch(part)["hash"][row].as_py(), part, row)

    def ngrams(self, part: int, row: int) -> Hashes:
        """Return the document's set."""
        return self._batch(part)["ngrams"][row].values.to_numpy()

    def _batch(self, part: int) -> pa.RecordBatch:
        if part not in self._open:
            # The mapping outlives the file that it was made from.
            with pa.memory_map(str(self._folder / self._parts[part]["documents"])) as source:
                self._open[part] = pa.ipc.open_file(source).get_batch(0)
        return self._open[part]
