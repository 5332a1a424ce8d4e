"""Near-duplicates in a whole corpus: MinHash and locality-sensitive hashing as a job over files.

    documents --MinHash--> bands --group by band--> candidates --exact Jaccard--> hashes to drop

Two documents with Jaccard index J of their word n-grams share a band of r rows with probability
J^r, and one of b bands with 1 - (1 - J^r)^b (Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, section 3.4). Candidates are compared by their n-grams themselves, so nothing is dropped
for a collision of hashes. Of two near-duplicates the one that comes later in the order of hashes
goes, but never a held-out one; what is dropped doesn't depend on how the input was cut up.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrlhf.data.ngrams import Hashes, jaccard, ngram_hashes

NEAR_DUPLICATE, NEAR_HELD_OUT = "near_duplicate", "near_held_out"
REASONS = (NEAR_DUPLICATE, NEAR_HELD_OUT)
MAX_COMPARED = 32
"""Of a band's documents, each is compared with so many that come before it."""
_SEED = 42
_KEYS = pa.schema([("key", pa.uint64()), ("row", pa.uint32())])


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
    """Writes the n-grams and the band keys of one piece's documents."""

    def __init__(self, folder: Path, name: str, held_out: bool, bands: Bands) -> None:
        self._folder, self._name, self._held_out, self._bands = folder, name, held_out, bands
        self._hashes: list[bytes] = []
        self._ngrams: list[Hashes] = []

    def add(self, texts: Sequence[str], hashes: Sequence[bytes]) -> None:
        """Take documents; those without words have no near-duplicates."""
        for digest, ngrams in zip(hashes, ngram_hashes(texts, self._bands.ngram), strict=True):
            if ngrams.size:
                self._hashes.append(digest)
                self._ngrams.append(ngrams)

    def finish(self) -> dict[str, Any] | None:
        """Write both files; returns their names and the partitions of the record batches."""
        if not self._hashes:
            return None
        offsets = np.zeros(len(self._hashes) + 1, dtype=np.int64)
        np.cumsum([len(ngrams) for ngrams in self._ngrams], out=offsets[1:])
        column = pa.LargeListArray.from_arrays(offsets, np.concatenate(self._ngrams))
        documents = pa.record_batch(
            [pa.array(self._hashes, type=pa.binary(16)), column],
            names=["hash", "ngrams"],
        )
        _write(self._folder / f"{self._name}.ngrams.arrow", [documents])
        keys = signatures(self._ngrams, self._bands)
        rows = np.repeat(np.arange(len(keys), dtype=np.uint32), self._bands.num_bands)
        flat = keys.reshape(-1)
        partition = flat % np.uint64(self._bands.num_partitions)
        order = np.argsort(partition, kind="stable")
        names, starts = np.unique(partition[order], return_index=True)
        parts = np.split(order, starts[1:])
        _write(
            self._folder / f"{self._name}.bands.arrow",
            [pa.record_batch([flat[part], rows[part]], schema=_KEYS) for part in parts],
        )
        return {
            "documents": f"{self._name}.ngrams.arrow",
            "bands": f"{self._name}.bands.arrow",
            "partitions": names.tolist(),
            "held_out": self._held_out,
        }


def find_in_partition(
    partition: int, pieces: Sequence[Mapping[str, Any]], folder: Path, threshold: float
) -> dict[bytes, str]:
    """Return {hash: reason} of the documents that are near-duplicates by a band of `partition`.

    `pieces` are the accounts of `Writer.finish`.
    """
    keys, places = _candidates(partition, pieces, folder)
    order = np.lexsort((places[:, 1], places[:, 0], keys))
    keys, places = keys[order], places[order]
    # Runs of equal keys with at least two documents.
    edges = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1, append=keys[-1:] + 1))
    documents = _Documents(pieces, folder)
    compared: dict[tuple[bytes, bytes], bool] = {}
    found: dict[bytes, str] = {}
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        if end - begin < 2:
            continue
        run = sorted({documents.order(int(piece), int(row)) for piece, row in places[begin:end]})
        for later in range(1, len(run)):
            is_training, digest, *place = run[later]
            if not is_training:
                continue  # held-out documents, which come first, stay
            for other_is_training, other, *other_place in run[: min(later, MAX_COMPARED)]:
                if other == digest or found.get(digest) == NEAR_HELD_OUT:
                    continue
                pair = (other, digest)
                if pair not in compared:
                    index = jaccard(documents.ngrams(*place), documents.ngrams(*other_place))
                    compared[pair] = index >= threshold
                if compared[pair]:
                    found[digest] = NEAR_DUPLICATE if other_is_training else NEAR_HELD_OUT
    return found


def _candidates(
    partition: int, pieces: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Return the keys of a partition (n,), and (piece, row) of their documents (n, 2)."""
    keys, places = [np.zeros(0, dtype=np.uint64)], [np.zeros((0, 2), dtype=np.int64)]
    for number, piece in enumerate(pieces):
        if partition not in piece["partitions"]:
            continue
        with pa.memory_map(str(folder / piece["bands"])) as source:
            batch = pa.ipc.open_file(source).get_batch(piece["partitions"].index(partition))
            keys.append(batch["key"].to_numpy().copy())
            rows = batch["row"].to_numpy().astype(np.int64)
        places.append(np.stack([np.full(len(rows), number), rows], axis=1))
    return np.concatenate(keys), np.concatenate(places)


class _Documents:
    """Random access to the n-grams of all pieces."""

    def __init__(self, pieces: Sequence[Mapping[str, Any]], folder: Path) -> None:
        self._pieces, self._folder = pieces, folder
        self._open: dict[int, pa.RecordBatch] = {}

    def order(self, piece: int, row: int) -> tuple[int, bytes, int, int]:
        """Return the sort key of a document, held-out ones first; ends with its place."""
        is_training = not self._pieces[piece]["held_out"]
        return (int(is_training), self._batch(piece)["hash"][row].as_py(), piece, row)

    def ngrams(self, piece: int, row: int) -> Hashes:
        """Return the document's set."""
        return self._batch(piece)["ngrams"][row].values.to_numpy()

    def _batch(self, piece: int) -> pa.RecordBatch:
        if piece not in self._open:
            source = pa.memory_map(str(self._folder / self._pieces[piece]["documents"]))
            self._open[piece] = pa.ipc.open_file(source).get_batch(0)
        return self._open[piece]


def _write(file: Path, batches: Sequence[pa.RecordBatch]) -> None:
    new = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(new), "wb") as sink, pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    os.replace(new, file)
