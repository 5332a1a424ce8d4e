"""Rows of a corpus: written as shards, read out of memory-mapped files, or in ranges of a bucket.

A row is named by its number; every shard holds its rows end to end at an offset that the manifest
knows, so reading one needs nothing but its place. Which rows a step takes is `records_between`.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrlhf.config import RecipeError
from rayrlhf.data.buckets import write_batches
from rayrlhf.data.storage import open_file

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int32]
BYTES_HASHED = 2**30
"""A corpus up to this size is hashed before training; of a larger one sizes are checked."""
_REQUESTS = 32
"""Shards of a bucket that are read at a time."""


def write_shard(file: Path, rows: Rows) -> dict[str, str | int]:
    """Write rows (n, T) in one step; returns the shard's entry of the manifest."""
    kind = pa.list_(pa.int32(), rows.shape[1])
    values = pa.array(np.ascontiguousarray(rows, dtype=np.int32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, type=kind)
    batch = pa.record_batch([column], names=["tokens"])
    write_batches(file, [batch], batch.schema)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "file": file.name,
        "rows": len(rows),
        "offset": _first_row_at(file),
        "sha256": digest,
    }


def read_manifest(corpus_dir: str | Path) -> dict[str, Any]:
    """Return the manifest of a corpus, local or at a URI; raises RecipeError without one."""
    path = f"{str(corpus_dir).rstrip('/')}/manifest.json"
    try:
        with open_file(path) as stream:
            manifest: dict[str, Any] = json.loads(stream.read())
    except OSError as error:
        raise RecipeError(
            f"{path}: no corpus here ({str(error).partition(chr(10))[0]}): run `rayrlhf corpus`, "
            "or correct pretrain.corpus"
        ) from None
    return manifest


def check_shards(corpus_dir: str | Path, manifest: dict[str, Any]) -> None:
    """Raise RecipeError for a shard that isn't what the manifest says."""
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    row_bytes = 4 * manifest["row_length"]
    small = sum(shard["rows"] for shard in shards) * row_bytes <= BYTES_HASHED

    def broken(shard: dict[str, Any]) -> str | None:
        path = f"{str(corpus_dir).rstrip('/')}/{shard['file']}"
        try:
            with open_file(path) as stream:
                complete = stream.size() > shard["offset"] + shard["rows"] * row_bytes
                if complete and small and "://" not in path:
                    complete = hashlib.sha256(stream.read()).hexdigest() == shard["sha256"]
        except OSError:
            complete = False
        return None if complete else path

    with ThreadPoolExecutor(_REQUESTS) as pool:
        for path in pool.map(broken, shards):
            if path is not None:
                raise RecipeError(
                    f"{path}: missing, cut off or changed since the corpus was written: copy it "
                    "again, or remove the folder and run `rayrlhf corpus`"
                )


class PackedRows:
    """Rows of T tokens out of the Arrow shards of one split of a corpus."""

    def __init__(self, corpus_dir: str | Path, split: str) -> None:
        """`split` is `train`, `validation-<source>` or `test-<source>`; a URI streams."""
        manifest = read_manifest(corpus_dir)
        folder = str(corpus_dir).rstrip("/")
        kind = _RemoteShard if "://" in folder else _LocalShard
        self._shards: list[_Shard] = [
            kind(f"{folder}/{shard['file']}", shard, manifest)
            for shard in manifest["splits"].get(split, {"shards": []})["shards"]
        ]
        self._pool = ThreadPoolExecutor(_REQUESTS) if kind is _RemoteShard else None
        if not self._shards:
            raise RecipeError(
                f"{corpus_dir}: no rows of the split {split}: run `rayrlhf corpus`, or "
                "name this split in corpus.sources"
            )
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.row_length = self._shards[0].row_length

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: Sequence[int]) -> "torch.Tensor":
        """Return the rows at `indices`: (n, T) int64."""
        import torch  # only here: tasks of the corpus write rows, and start sooner without it

        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"row {wanted.min()} to {wanted.max()} of {len(self)}")
        out = np.empty((len(wanted), self.row_length), dtype=np.int64)  # (n, T)
        places = np.searchsorted(self._ends, wanted, side="right")

        def read(place: np.intp) -> None:
            shard, here = self._shards[place], places == place
            out[here] = shard.take(wanted[here] - (self._ends[place] - len(shard)))

        # Rows of a shuffled batch lie in as many shards: a bucket's latency is paid once for all.
        for _ in (self._pool.map if self._pool else map)(read, np.unique(places)):
            pass
        return torch.from_numpy(out)


def _first_row_at(file: Path) -> int:
    """Return the byte of a shard where the first row begins."""
    with pa.memory_map(str(file)) as mapped:
        start = mapped.read_buffer().address
        mapped.seek(0)
        column = pa.ipc.open_file(mapped).get_batch(0).column("tokens")
        return int(column.values.buffers()[1].address - start)


class _Shard(Protocol):
    row_length: int

    def __len__(self) -> int: ...

    def take(self, wanted: npt.NDArray[np.int64]) -> Rows:
        """Return rows (n, T)."""


class _LocalShard:
    """A file mapped into memory."""

    def __init__(self, path: str, shard: dict[str, Any], manifest: dict[str, Any]) -> None:
        del shard, manifest  # the file says it all
        with pa.memory_map(path) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        column = table.column("tokens")
        self.row_length = int(column.type.list_size)
        (chunk,) = column.chunks
        self._rows: Rows = chunk.flatten().to_numpy().reshape(-1, self.row_length)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, wanted: npt.NDArray[np.int64]) -> Rows:
        return self._rows[wanted]


class _RemoteShard:
    """A file of which ranges are read; rows that follow each other in one."""

    def __init__(self, path: str, shard: dict[str, Any], manifest: dict[str, Any]) -> None:
        self._path, self._rows, self._offset = path, int(shard["rows"]), int(shard["offset"])
        self.row_length = int(manifest["row_length"])
        self._file: Any = None

    def __len__(self) -> int:
        return self._rows

    def take(self, wanted: npt.NDArray[np.int64]) -> Rows:
        if self._file is None:
            self._file = open_file(self._path)
        order, back = np.unique(wanted, return_inverse=True)
        runs = np.split(order, np.flatnonzero(np.diff(order) > 1) + 1)
        parts = [self._range(int(run[0]), len(run)) for run in runs]
        return np.concatenate(parts)[back]

    def _range(self, first: int, count: int) -> Rows:
        row_bytes = 4 * self.row_length
        content = self._file.read_at(count * row_bytes, self._offset + first * row_bytes)
        return np.frombuffer(content, dtype=np.int32).reshape(count, self.row_length)
