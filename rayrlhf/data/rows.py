"""Rows of a corpus: written as shards, read out of memory-mapped files, or in ranges of a bucket.

A row is named by its number; every shard holds its rows end to end at an offset that the manifest
knows, so reading one needs nothing but its place. Which rows a step takes is `batch_indices`.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from rayrlhf.config import RecipeError
from rayrlhf.data.storage import open_file

Rows = npt.NDArray[np.int32]
BYTES_HASHED = 2**30
"""A corpus up to this size is hashed before training; of a larger one sizes are checked."""
_REQUESTS = 16
"""Ranges that are read at a time."""


def write_shard(file: Path, rows: Rows) -> dict[str, str | int]:
    """Write rows (n, T) in one step; returns the shard's entry of the manifest."""
    kind = pa.list_(pa.int32(), rows.shape[1])
    values = pa.array(np.ascontiguousarray(rows, dtype=np.int32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, type=kind)
    new = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with (
        pa.OSFile(str(new), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("tokens", kind)])) as writer,
    ):
        writer.write_batch(pa.record_batch([column], names=["tokens"]))
    entry: dict[str, str | int] = {
        "file": file.name,
        "rows": len(rows),
        "offset": _first_row_at(new),
        "sha256": hashlib.sha256(new.read_bytes()).hexdigest(),
    }
    os.replace(new, file)
    return entry


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
    for shard in shards:
        path = f"{str(corpus_dir).rstrip('/')}/{shard['file']}"
        try:
            with open_file(path) as stream:
                complete = stream.size() > shard["offset"] + shard["rows"] * row_bytes
                if complete and small and "://" not in path:
                    complete = hashlib.sha256(stream.read()).hexdigest() == shard["sha256"]
        except OSError:
            complete = False
        if not complete:
            raise RecipeError(
                f"{path}: missing, cut off or changed since the corpus was written: copy it "
                "again, or remove the folder and run `rayrlhf corpus`"
            )


class PackedRows:
    """Rows of T tokens out of the Arrow shards of one split of a corpus."""

    def __init__(self, corpus_dir: str | Path, split: str) -> None:
        """`split` is `train`, `validation-<source>` or `test-<source>`; a URI streams."""
        self._shards: list[_Shard]
        if "://" in str(corpus_dir):
            manifest = read_manifest(corpus_dir)
            found = manifest["splits"].get(split, {"shards": []})["shards"]
            self._shards = [
                _RemoteShard(f"{str(corpus_dir).rstrip('/')}/{shard['file']}", shard, manifest)
                for shard in found
            ]
        else:
            pattern = re.compile(re.escape(split) + r"-\d{5}\.arrow")
            files = sorted(f for f in Path(corpus_dir).glob("*.arrow") if pattern.fullmatch(f.name))
            self._shards = [_LocalShard(file) for file in files]
        if not self._shards:
            raise RecipeError(
                f"{corpus_dir}: no rows of the split {split}: run `rayrlhf corpus`, or "
                "name this split in corpus.sources"
            )
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.row_length = self._shards[0].row_length

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the rows at `indices`: (n, T) int64."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"row {wanted.min()} to {wanted.max()} of {len(self)}")
        out = np.empty((len(wanted), self.row_length), dtype=np.int64)  # (n, T)
        places = np.searchsorted(self._ends, wanted, side="right")
        for place in np.unique(places):
            shard = self._shards[place]
            here = places == place
            out[here] = shard.take(wanted[here] - (self._ends[place] - len(shard)))
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

    def __init__(self, file: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        column = table.column("tokens")
        self.row_length = int(column.type.list_size)
        (chunk,) = column.chunks
        self._rows: Rows = chunk.flatten().to_numpy().reshape(-1, self.row_length)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, wanted: npt.NDArray[np.int64]) -> Rows:
        return self._rows[wanted]


class _RemoteShard:
    """A file of which ranges are read, several at a time; rows that follow each other in one."""

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
        with ThreadPoolExecutor(min(_REQUESTS, len(runs))) as pool:
            parts = list(pool.map(lambda run: self._range(int(run[0]), len(run)), runs))
        return np.concatenate(parts)[back]

    def _range(self, first: int, count: int) -> Rows:
        row_bytes = 4 * self.row_length
        content = self._file.read_at(count * row_bytes, self._offset + first * row_bytes)
        return np.frombuffer(content, dtype=np.int32).reshape(count, self.row_length)
