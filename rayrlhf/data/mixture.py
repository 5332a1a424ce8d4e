"""Second pass of the corpus job: deduplicate, mix, shuffle and pack one group of documents.

A document's place in the shuffled mixture is a hash of (seed, document, copy), so the shards are
the same bytes whatever the number of pieces, tasks and machines.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rayrlhf.data import buckets
from rayrlhf.data.buckets import DUPLICATE, Document, Group, Shuffle
from rayrlhf.data.documents import NUM_EXAMPLES, encoder_of
from rayrlhf.data.packing import pack, pack_best_fit
from rayrlhf.data.rows import Rows, write_shard

SAMPLE_BINS = 1024
"""Parts that a source's documents are counted in to find where a sample ends."""


@dataclass(frozen=True)
class MixtureRules:
    """How documents become rows."""

    tokenizer: str
    """Folder of the tokenizer."""
    seed: int
    row_length: int
    rows_per_shard: int
    packing: Literal["stream", "best_fit"]
    epochs: Mapping[str, float]
    """Per source."""
    sample_below: Mapping[str, float]
    """Per source: documents whose place, from 0 to 1, is below occur once more than the whole part
    of the epochs says; see `sample_threshold`."""
    eos_id: int


def sample_tokens(group: Group, seed: int, shuffle: Shuffle) -> dict[str, list[int]]:
    """Return the tokens per source that `pack_group` will have to mix, by the documents' places.

    A source's list has the tokens of SAMPLE_BINS equal parts of the places from 0 to 1.
    """
    kept, _ = _unique(buckets.documents(shuffle, group), buckets.to_drop(shuffle, group))
    counts: dict[str, list[int]] = {}
    for document in kept:
        bins = counts.setdefault(document.source, [0] * SAMPLE_BINS)
        bins[int(_place(seed, document.hash) * SAMPLE_BINS)] += len(document.tokens)
    return counts


def sample_threshold(bins: Sequence[int], part: float) -> float:
    """Return the place below which the documents have, as nearly as can be, `part` of the tokens.

    `bins` is the sum of a source's lists of `sample_tokens`.
    """
    tokens = np.concatenate([[0], np.cumsum(bins)])
    return int(np.abs(tokens - part * tokens[-1]).argmin()) / len(bins)


def pack_group(group: Group, rules: MixtureRules, shuffle: Shuffle) -> dict[str, Any]:
    """Write the shards of a group; return its account."""
    folder = Path(shuffle.work) / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    found, drop = buckets.documents(shuffle, group), buckets.to_drop(shuffle, group)
    kept, dropped = _unique(found, drop)
    copies = _mixture(kept, rules) if group.is_training else kept
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
    times = Counter(document.hash for document in copies)
    sources = sorted({part.source for part in shuffle.parts if part.split == group.split})
    return {
        "split": group.split_name,
        "shards": _write_shards(rows, group, rules, folder),
        "rows": len(rows),
        "document_tokens": tokens,
        "delimiters": len(texts),
        "padding": padding,
        "tail_tokens_dropped": dropped_tail,
        "sources": {
            source: _account(source, kept, times, dropped, rules.tokenizer)
            for source in ([group.source] if group.source else sources)
        },
    }


def _unique(
    documents: Sequence[Document], drop: Mapping[bytes, str]
) -> tuple[list[Document], dict[str, list[Document]]]:
    """Return the documents once each, and those that are left out by reason.

    Of equal texts the one of the first source (by name) stays.
    """
    kept: list[Document] = []
    dropped: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda d: (d.hash, d.source)):
        reason = drop.get(document.hash)
        if reason is None and kept and kept[-1].hash == document.hash:
            reason = DUPLICATE
        if reason is None:
            kept.append(document)
        else:
            dropped.setdefault(reason, []).append(document)
    return kept, dropped


def _mixture(documents: Sequence[Document], rules: MixtureRules) -> list[Document]:
    """Return documents in shuffled order: floor(epochs) copies of each, one more of a sample.

    Whether a document is in the sample follows from its own hash, not from those beside it.
    """
    order: list[tuple[bytes, Document]] = []
    for document in documents:
        copies = int(rules.epochs.get(document.source, 1.0))
        below = rules.sample_below.get(document.source, 0.0)
        copies += below > 0 and _place(rules.seed, document.hash) < below
        for copy in range(copies):
            order.append((_key(rules.seed, document.hash, str(copy)), document))
    return [document for _, document in sorted(order, key=lambda item: item[0])]


def _place(seed: int, digest: bytes) -> float:
    """Return a document's place in the order in which samples are taken: from 0 to below 1."""
    return int.from_bytes(_key(seed, digest, "sample")[:6], "big") / 2**48


def _key(seed: int, digest: bytes, purpose: str) -> bytes:
    return hashlib.blake2b(digest + f"{seed} {purpose}".encode(), digest_size=16).digest()


def _account(
    source: str,
    kept: Sequence[Document],
    times: Mapping[bytes, int],
    dropped: Mapping[str, Sequence[Document]],
    tokenizer: str,
) -> dict[str, Any]:
    """Return what became of a source's documents: kept + repeated - sampled out = mixed."""
    gone = {
        reason: [document for document in documents if document.source == source]
        for reason, documents in dropped.items()
    }
    mine = [document for document in kept if document.source == source]

    def tokens(documents: Sequence[Document]) -> int:
        return sum(len(document.tokens) for document in documents)

    return {
        "dropped": {reason: len(documents) for reason, documents in gone.items()},
        "dropped_tokens": {reason: tokens(documents) for reason, documents in gone.items()},
        "examples": {
            reason: [
                encoder_of(tokenizer).tokenizer.decode(document.tokens[:50].tolist())
                for document in documents[:NUM_EXAMPLES]
            ]
            for reason, documents in gone.items()
            if documents
        },
        "kept": len(mine),
        "kept_tokens": tokens(mine),
        "repeated_tokens": sum(max(0, times[d.hash] - 1) * len(d.tokens) for d in mine),
        "sampled_out_tokens": sum(len(d.tokens) for d in mine if not times[d.hash]),
        "in_mixture": sum(times[document.hash] for document in mine),
        "tokens": sum(times[document.hash] * len(document.tokens) for document in mine),
    }


def _write_shards(
    rows: Rows, group: Group, rules: MixtureRules, folder: Path
) -> list[dict[str, str | int]]:
    return [
        write_shard(
            folder / f"{group.name}-part-{number:05d}.arrow",
            rows[start : start + rules.rows_per_shard],
        )
        for number, start in enumerate(range(0, len(rows), rules.rows_per_shard))
    ]
