"""What workers do to the documents of a corpus: read, clean, tokenize, then deduplicate and pack.

Everything here is a function of its arguments: a document is known by the hash of its cleaned
text, and its place in the shuffled mixture by a hash of (seed, document, copy). So the shards are
the same bytes whatever the number of blocks, tasks and machines. Workers import neither torch nor
transformers for it.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from tokenizers import Tokenizer

from rayrlhf.data.cleaning import Cleaning
from rayrlhf.data.packing import pack
from rayrlhf.data.records import parse_line

KEPT, HELD_OUT, DUPLICATE = "kept", "held_out", "duplicate"
NUM_EXAMPLES = 3
"""Dropped documents per source and reason that the manifest quotes."""
# What a map task hands to the groups: one row per document, dropped ones without tokens.
COLUMNS = pa.schema(
    [
        ("group", pa.string()),
        ("source", pa.string()),
        ("hash", pa.binary(16)),
        ("fate", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("excerpt", pa.string()),
    ]
)
_DOCUMENTS_PER_BATCH = 2048


@dataclass(frozen=True)
class Piece:
    """A part of an input file that one task reads."""

    source: str
    split: str
    """`train`, `validation` or `test`."""
    file: str
    start: int
    """First byte of a JSONL piece; first row group of a Parquet one."""
    end: int
    """One behind the last; a line belongs to the piece that holds its first byte."""


@dataclass(frozen=True)
class Rules:
    """How documents become rows."""

    seed: int
    row_length: int
    rows_per_shard: int
    cleaning: Cleaning
    num_buckets: int
    """Groups that the training documents are divided into, by their hash."""
    epochs: Mapping[str, float]
    """Per source."""
    tokenizer: str
    """Folder of the tokenizer."""
    eos_id: int
    folder: str
    """Where the shards are written."""

    @property
    def reasons(self) -> list[str]:
        """Why a document may be dropped."""
        return [*self.cleaning.reasons, HELD_OUT, DUPLICATE]


def text_hash(text: str) -> bytes:
    """Return the 16 bytes that a cleaned text is known by."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def read_piece(piece: Piece) -> Iterator[str]:
    """Yield the texts of a piece; every document of a file is in exactly one of its pieces."""
    if piece.file.endswith(".parquet"):
        with pq.ParquetFile(piece.file) as table:
            for group in range(piece.start, piece.end):
                yield from table.read_row_group(group, columns=["text"])["text"].to_pylist()
        return
    with open(piece.file, "rb") as stream:
        if piece.start:
            stream.seek(piece.start - 1)
            stream.readline()  # the end of the line before
        while (start := stream.tell()) < piece.end:
            line = stream.readline().removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield parse_line(line, f"{piece.file} at byte {start}")["text"]


def tokenize_pieces(
    batch: Mapping[str, Sequence[Any]], *, rules: Rules, held_out_ref: ray.ObjectRef
) -> Iterator[pa.Table]:
    """Read, clean and tokenize pieces (one per row of `batch`); yields tables of COLUMNS.

    `held_out_ref` refers to the set of hashes of held-out texts.
    """
    held_out = ray.get(held_out_ref)
    for text in batch["piece"]:
        piece = Piece(**json.loads(text))
        rows: list[tuple[str, bytes]] = []
        for document in read_piece(piece):
            cleaned = rules.cleaning.apply(document)
            rows.append((cleaned, text_hash(cleaned)))
            if len(rows) == _DOCUMENTS_PER_BATCH:
                yield _table(piece, rows, rules, held_out)
                rows = []
        yield _table(piece, rows, rules, held_out)


def pack_group(group: pa.Table, *, rules: Rules) -> dict[str, list[str]]:
    """Deduplicate, mix, shuffle and pack one group, write its shards, return its account."""
    name = group["group"][0].as_py()
    epochs = rules.epochs if name.startswith("train/") else {}
    fates = Counter(zip(group["source"].to_pylist(), group["fate"].to_pylist(), strict=True))
    documents, duplicates = _unique(group)
    copies = _mixture(documents, epochs, rules.seed)
    tokens = group["tokens"].combine_chunks()
    values, offsets = tokens.values.to_numpy(), tokens.offsets.to_numpy()
    texts = [values[offsets[row] : offsets[row + 1]] for row in copies]
    rows, tail = pack(texts, rules.row_length, rules.eos_id)
    sources = group["source"].to_pylist()
    account: dict[str, Any] = {
        "group": name,
        "shards": _write_shards(rows, name, rules),
        "document_tokens": sum(len(text) for text in texts),
        "delimiters": len(texts),
        "rows": len(rows),
        "tail_tokens_dropped": tail,
        "sources": {},
    }
    for source in sorted(set(sources)):
        mine = [
            (row, text) for row, text in zip(copies, texts, strict=True) if sources[row] == source
        ]
        account["sources"][source] = {
            "read": sum(count for (s, _), count in fates.items() if s == source),
            "dropped": {
                reason: duplicates[source] if reason == DUPLICATE else fates[source, reason]
                for reason in rules.reasons
            },
            "examples": _examples(group, source),
            "kept": fates[source, KEPT] - duplicates[source],
            "in_mixture": len(mine),
            "tokens": sum(len(text) for _, text in mine),
        }
    return {"account": [json.dumps(account)]}


def bucket_of(digest: bytes, num_buckets: int) -> int:
    """Return the group of a training document: equal texts meet in one, wherever they lie."""
    return int.from_bytes(digest[:8], "big") % num_buckets


def _table(
    piece: Piece, rows: list[tuple[str, bytes]], rules: Rules, held_out: frozenset[bytes]
) -> pa.Table:
    fates = [
        rules.cleaning.reason(text)
        or (HELD_OUT if piece.split == "train" and digest in held_out else KEPT)
        for text, digest in rows
    ]
    texts = [text if fate == KEPT else "" for (text, _), fate in zip(rows, fates, strict=True)]
    encoded = _tokenizer(rules.tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    groups = [
        f"train/{bucket_of(digest, rules.num_buckets):05d}"
        if piece.split == "train"
        else f"{piece.split}-{piece.source}"
        for _, digest in rows
    ]
    columns = [
        groups,
        [piece.source] * len(rows),
        [digest for _, digest in rows],
        fates,
        [item.ids for item in encoded],
        [None if fate == KEPT else text[:200] for (text, _), fate in zip(rows, fates, strict=True)],
    ]
    return pa.table(
        [pa.array(column, type=field.type) for column, field in zip(columns, COLUMNS, strict=True)],
        schema=COLUMNS,
    )


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    # The name of a special token inside a document is ordinary text.
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _unique(group: pa.Table) -> tuple[list[tuple[str, bytes, int]], Counter[str]]:
    """Return (source, hash, row) of every text once, and the number of duplicates per source.

    Of equal texts the one of the first source (by name) stays, so that the result does not
    depend on the order in which blocks arrive.
    """
    rows = sorted(
        (digest, source, row)
        for row, (source, digest, fate) in enumerate(
            zip(
                group["source"].to_pylist(),
                group["hash"].to_pylist(),
                group["fate"].to_pylist(),
                strict=True,
            )
        )
        if fate == KEPT
    )
    unique: list[tuple[str, bytes, int]] = []
    duplicates: Counter[str] = Counter()
    for digest, source, row in rows:
        if unique and unique[-1][1] == digest:
            duplicates[source] += 1
        else:
            unique.append((source, digest, row))
    return unique, duplicates


def _examples(group: pa.Table, source: str) -> dict[str, list[str]]:
    """Return how some dropped documents begin, per reason: those with the smallest hashes."""
    dropped = group.filter((pc.field("source") == source) & (pc.field("fate") != KEPT))
    found: dict[str, list[str]] = {}
    for row in dropped.select(["hash", "fate", "excerpt"]).sort_by("hash").to_pylist():
        quotes = found.setdefault(row["fate"], [])
        if len(quotes) < NUM_EXAMPLES and row["excerpt"] and row["excerpt"] not in quotes:
            quotes.append(row["excerpt"])
    return {reason: quotes for reason, quotes in sorted(found.items()) if quotes}


def _mixture(
    documents: Sequence[tuple[str, bytes, int]], epochs: Mapping[str, float], seed: int
) -> list[int]:
    """Return rows in shuffled order: floor(epochs) copies of each, and a sample for the rest."""
    by_source: dict[str, list[tuple[bytes, int]]] = {}
    for source, digest, row in documents:
        by_source.setdefault(source, []).append((digest, row))
    order: list[tuple[bytes, int]] = []
    for source, mine in by_source.items():
        whole = math.floor(epochs.get(source, 1.0))
        extra = round((epochs.get(source, 1.0) - whole) * len(mine))
        sampled = sorted(mine, key=lambda item: _key(seed, item[0], "sample"))[:extra]
        for copy, chosen in enumerate([*[mine] * whole, sampled]):
            order += [(_key(seed, digest, str(copy)), row) for digest, row in chosen]
    return [row for _, row in sorted(order)]


def _key(seed: int, digest: bytes, purpose: str) -> bytes:
    return hashlib.blake2b(digest + f"{seed} {purpose}".encode(), digest_size=16).digest()


def _write_shards(
    rows: npt.NDArray[np.int32], name: str, rules: Rules
) -> list[dict[str, str | int]]:
    shards: list[dict[str, str | int]] = []
    kind = pa.list_(pa.int32(), rules.row_length)
    for start in range(0, len(rows), rules.rows_per_shard):
        part = np.ascontiguousarray(rows[start : start + rules.rows_per_shard])
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), type=kind)
        file = Path(rules.folder) / f"{name.replace('/', '-')}-part-{len(shards):05d}.arrow"
        # Another try of the same task may be writing too.
        new = file.with_suffix(f".{os.getpid()}.tmp")
        with (
            pa.OSFile(str(new), "wb") as sink,
            pa.ipc.new_file(sink, pa.schema([("tokens", kind)])) as writer,
        ):
            writer.write_batch(pa.record_batch([column], names=["tokens"]))
        digest = hashlib.sha256(new.read_bytes()).hexdigest()
        os.replace(new, file)
        shards.append({"file": file.name, "rows": len(part), "sha256": digest})
    return shards
