"""Last step of the corpus job: deduplicate, mix, shuffle and pack one group of documents.

A document's place in the shuffled mixture is a hash of (seed, document, copy), so the shards are
the same bytes whatever the number of pieces, tasks and machines. The account of a group is written
last: a group that has one is finished and not done again.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayrlhf.data.documents import NUM_EXAMPLES, open_tokenizer, write_whole
from rayrlhf.data.packing import pack, pack_best_fit
from rayrlhf.data.rows import write_shard

DUPLICATE, HELD_OUT = "duplicate", "held_out"
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class MixtureRules:
    """How documents become rows."""

    work: str
    """Folder of the job."""
    tokenizer: str
    """Folder of the tokenizer."""
    seed: int
    row_length: int
    rows_per_shard: int
    packing: Literal["stream", "best_fit"]
    epochs: Mapping[str, float]
    """Per source."""
    eos_id: int


@dataclass(frozen=True)
class Group:
    """Documents that become rows together."""

    name: str
    """`train/<bucket>`, or `<split>-<source>`."""
    batches: Sequence[tuple[str, str, int]]
    """Their (source, file, number of the record batch)."""

    @property
    def is_training(self) -> bool:
        """Held-out groups are neither mixed nor compared with others."""
        return self.name.startswith("train/")


@dataclass(frozen=True)
class _Document:
    source: str
    hash: bytes
    tokens: Tokens


def unique_tokens(group: Group, work: str, drop: Mapping[bytes, str]) -> dict[str, int]:
    """Return the tokens per source that `pack_group` will have to mix."""
    kept, _ = _unique(_read(group, work), drop)
    counts: Counter[str] = Counter()
    for document in kept:
        counts[document.source] += len(document.tokens)
    return dict(counts)


def pack_group(group: Group, rules: MixtureRules, drop: Mapping[bytes, str]) -> dict[str, Any]:
    """Write the shards of a group, then its account, which is returned.

    `drop` are the hashes of documents to leave out, with the reason: texts that are also held
    out, near-duplicates.
    """
    folder = Path(rules.work) / "shards"
    done = folder / f"{group.name.replace('/', '-')}.json"
    if done.exists():
        account: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return account
    folder.mkdir(parents=True, exist_ok=True)
    kept, dropped = _unique(_read(group, rules.work), drop if group.is_training else {})
    copies = _mixture(kept, rules.epochs if group.is_training else {}, rules.seed)
    texts = [document.tokens for document in copies]
    padding = dropped_tail = 0
    if rules.packing == "stream" or not group.is_training:  # a loss of rows that compare
        rows, dropped_tail = pack(texts, rules.row_length, rules.eos_id)
    else:
        rows, padding = pack_best_fit(texts, rules.row_length, rules.eos_id)
    tokens = sum(len(text) for text in texts)
    if tokens + len(texts) + padding != rows.size + dropped_tail:
        raise AssertionError(
            f"{group.name}: {tokens} + {len(texts)} + {padding} tokens in, "
            f"{rows.size} + {dropped_tail} out"
        )
    account = {
        "group": group.name,
        "shards": _write_shards(rows, group, rules, folder),
        "rows": len(rows),
        "document_tokens": tokens,
        "delimiters": len(texts),
        "padding": padding,
        "tail_tokens_dropped": dropped_tail,
        "sources": _per_source(group, kept, copies, dropped, rules.tokenizer),
    }
    write_whole(done, json.dumps(account).encode())
    return account


def _read(group: Group, work: str) -> list[_Document]:
    documents: list[_Document] = []
    for source, file, number in group.batches:
        with pa.memory_map(str(Path(work) / "documents" / file)) as mapped:
            batch = pa.ipc.open_file(mapped).get_batch(number)
            values = batch["tokens"].values.to_numpy()
            offsets = batch["tokens"].offsets.to_numpy()
            hashes = batch["hash"].to_pylist()
        documents += [
            _Document(source, digest, values[start:end])
            for digest, start, end in zip(hashes, offsets[:-1], offsets[1:], strict=True)
        ]
    return documents


def _unique(
    documents: Sequence[_Document], drop: Mapping[bytes, str]
) -> tuple[list[_Document], dict[str, list[_Document]]]:
    """Return the documents once each, and those that are left out by reason.

    Of equal texts the one of the first source (by name) stays.
    """
    kept: list[_Document] = []
    dropped: dict[str, list[_Document]] = {}
    for document in sorted(documents, key=lambda d: (d.hash, d.source)):
        reason = drop.get(document.hash)
        if reason is None and kept and kept[-1].hash == document.hash:
            reason = DUPLICATE
        if reason is None:
            kept.append(document)
        else:
            dropped.setdefault(reason, []).append(document)
    return kept, dropped


def _mixture(
    documents: Sequence[_Document], epochs: Mapping[str, float], seed: int
) -> list[_Document]:
    """Return documents in shuffled order: floor(epochs) copies of each, a sample for the rest."""
    by_source: dict[str, list[_Document]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    order: list[tuple[bytes, _Document]] = []
    for source, mine in by_source.items():
        whole = math.floor(epochs.get(source, 1.0))
        extra = round((epochs.get(source, 1.0) - whole) * len(mine))
        sampled = sorted(mine, key=lambda document: _key(seed, document.hash, "sample"))[:extra]
        for copy, chosen in enumerate([*[mine] * whole, sampled]):
            order += [(_key(seed, document.hash, str(copy)), document) for document in chosen]
    return [document for _, document in sorted(order, key=lambda item: item[0])]


def _key(seed: int, digest: bytes, purpose: str) -> bytes:
    return hashlib.blake2b(digest + f"{seed} {purpose}".encode(), digest_size=16).digest()


def _per_source(
    group: Group,
    kept: Sequence[_Document],
    copies: Sequence[_Document],
    dropped: Mapping[str, Sequence[_Document]],
    tokenizer: str,
) -> dict[str, Any]:
    sources = {}
    for source in sorted({source for source, _, _ in group.batches}):
        gone = {
            reason: [document for document in documents if document.source == source]
            for reason, documents in dropped.items()
        }
        mine = [len(document.tokens) for document in kept if document.source == source]
        mixed = [len(document.tokens) for document in copies if document.source == source]
        sources[source] = {
            "dropped": {reason: len(documents) for reason, documents in gone.items()},
            "dropped_tokens": {
                reason: sum(len(document.tokens) for document in documents)
                for reason, documents in gone.items()
            },
            "examples": {
                reason: [
                    open_tokenizer(tokenizer).decode(document.tokens[:50].tolist())
                    for document in documents[:NUM_EXAMPLES]
                ]
                for reason, documents in gone.items()
                if documents
            },
            "kept": len(mine),
            "kept_tokens": sum(mine),
            "in_mixture": len(mixed),
            "tokens": sum(mixed),
        }
    return sources


def _write_shards(
    rows: Tokens, group: Group, rules: MixtureRules, folder: Path
) -> list[dict[str, str | int]]:
    return [
        write_shard(
            folder / f"{group.name.replace('/', '-')}-part-{number:05d}.arrow",
            rows[start : start + rules.rows_per_shard],
        )
        for number, start in enumerate(range(0, len(rows), rules.rows_per_shard))
    ]
