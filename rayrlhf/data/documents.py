"""First pass of the corpus job: read, clean and tokenize the documents of one piece of input.

    piece --read--> texts --clean, filter--> kept --tokenize--> <work>/documents/<piece>-*.arrow

A document is known by the hash of its cleaned text; buckets.py says how parts are laid out. Workers
import neither torch nor transformers for it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayrlhf.config import RecipeError
from rayrlhf.data import buckets, inputs, near_duplicates, records
from rayrlhf.data.cleaning import Cleaning
from rayrlhf.data.encoder import Encoder
from rayrlhf.data.near_duplicates import Bands
from rayrlhf.data.ngrams import Hashes, ngram_hashes, share_any
from rayrlhf.data.storage import InputFile

CONTAMINATED = "contaminated"
NUM_EXAMPLES = 3
"""Dropped documents per source and reason that the manifest quotes."""
NUM_ERRORS = 20
"""Messages per piece; all are counted."""
_DOCUMENTS_PER_BATCH = 1024
_TOKENS_PER_PART = 2**24
"""Tokens that a worker holds before it writes them."""


@dataclass(frozen=True)
class Piece:
    """A part of an input file that one task reads."""

    number: int
    source: str
    split: str
    """`train`, `validation` or `test`."""
    file: InputFile
    start: int
    """First byte of a piece of JSON lines; first row group of a Parquet one."""
    end: int
    """One behind the last."""

    @property
    def name(self) -> str:
        """Name of what the piece writes."""
        return f"{self.number:06d}"

    def to_json(self) -> str:
        """Return the piece as a column of Ray Data can hold it."""
        return json.dumps(
            {**self.__dict__, "file": [self.file.path, self.file.size, self.file.modified]}
        )

    @classmethod
    def from_json(cls, text: str) -> "Piece":
        """Undo `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "file": InputFile(*fields["file"])})


@dataclass(frozen=True)
class TextRules:
    """How texts become tokens."""

    work: str
    """Folder of the job."""
    tokenizer: str
    """Folder of the tokenizer."""
    cleaning: Mapping[str, Cleaning]
    """Per source."""
    num_buckets: int
    """Groups that the training documents are divided into, by their hash."""
    bands: Bands | None
    """Of the search for near-duplicates; None: there is none."""
    contaminated_ngram: int
    skip_errors: bool

    @property
    def reasons(self) -> list[str]:
        """Why this step may drop a document."""
        found = [reason for cleaning in self.cleaning.values() for reason in cleaning.reasons]
        return [*dict.fromkeys(found), *([CONTAMINATED] if self.contaminated_ngram else [])]


@dataclass
class _Counts:
    """What became of one piece's documents."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0

    def drop(self, reason: str, text: str) -> None:
        self.dropped[reason] += 1
        quotes, quote = self.examples.get(reason, []), text[:200]
        if quote and quote not in quotes and len(quotes) < NUM_EXAMPLES:
            self.examples[reason] = [*quotes, quote]


def text_hash(text: str) -> bytes:
    """Return the 16 bytes that a cleaned text is known by."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def tokenize_piece(piece: Piece, rules: TextRules, contaminated: Hashes) -> dict[str, Any]:
    """Write the tokens of a piece's kept documents; return the piece's account.

    `contaminated` are the sorted hashes of the n-grams of evaluation texts. Errors are listed in
    the account; with `skip_errors` the rest is kept, else reading stops at the first.
    """
    folder = Path(rules.work) / "documents"
    folder.mkdir(parents=True, exist_ok=True)
    counts, parts = _Counts(), _Parts(piece, rules, folder)
    try:
        texts: list[str] = []
        for text in _texts(piece, rules, counts):
            texts.append(text)
            if len(texts) == _DOCUMENTS_PER_BATCH:
                _add_documents(texts, rules, contaminated, counts, parts)
                texts = []
        _add_documents(texts, rules, contaminated, counts, parts)
    except _FirstError:
        return {
            "piece": piece.number,
            "errors": counts.errors,
            "num_errors": counts.num_errors,
            "failed": True,
        }
    return {
        "piece": piece.number,
        "source": piece.source,
        "split": piece.split,
        "read": counts.read,
        "dropped": {reason: counts.dropped[reason] for reason in rules.reasons},
        "examples": counts.examples,
        "tokens": counts.tokens,
        "bytes": counts.bytes,
        "words": counts.words,
        "errors": counts.errors,
        "num_errors": counts.num_errors,
        "sha256": _sha256(piece),
        **parts.finish(),
    }


@lru_cache(maxsize=1)
def encoder_of(folder: str) -> Encoder:
    """Return the tokenizer of a folder with the words that this process has met."""
    return Encoder(folder)


class _FirstError(Exception):
    """Reading stops here."""


def _texts(piece: Piece, rules: TextRules, counts: _Counts) -> Iterator[str]:
    def note(error: RecipeError) -> None:
        counts.num_errors += 1
        if len(counts.errors) < NUM_ERRORS:
            counts.errors.append(str(error))
        if not rules.skip_errors:
            raise _FirstError

    read = inputs.read(piece.file, (piece.start, piece.end), columns=["text"], on_error=note)
    any_record = False
    for where, record in read:
        any_record = True
        try:
            text = records.check_exactly(piece.file, where, record, "document")["text"]
        except RecipeError as error:
            note(error)
            continue
        counts.read += 1
        yield rules.cleaning[piece.source].apply(text)
    if not any_record and not counts.num_errors and piece.start == 0:
        note(records.empty_file(piece.file, "document"))


def _add_documents(
    texts: list[str], rules: TextRules, contaminated: Hashes, counts: _Counts, parts: "_Parts"
) -> None:
    kept, cleaning = [], rules.cleaning[parts.piece.source]
    for text in texts:
        reason = cleaning.reason(text)
        if reason is None:
            kept.append(text)
        else:
            counts.drop(reason, text)
    if contaminated.size and parts.piece.split == "train":
        clean = []
        for text, hashes in zip(kept, ngram_hashes(kept, rules.contaminated_ngram), strict=True):
            if share_any(hashes, contaminated):
                counts.drop(CONTAMINATED, text)
            else:
                clean.append(text)
        kept = clean
    tokens = encoder_of(rules.tokenizer).encode(kept)
    counts.tokens += sum(map(len, tokens))
    counts.bytes += sum(len(text.encode("utf-8")) for text in kept)
    counts.words += sum(len(text.split()) for text in kept)
    parts.add(kept, tokens)


class _Parts:
    """The files of one piece: documents, and what the search for near-duplicates needs of them."""

    def __init__(self, piece: Piece, rules: TextRules, folder: Path) -> None:
        self.piece, self._folder = piece, folder
        self._num_buckets = rules.num_buckets if piece.split == "train" else 1
        self._hashes: list[bytes] = []
        self._tokens: list[Any] = []
        self._size = 0
        self._files: list[str] = []
        self._near = (
            near_duplicates.Writer(folder, piece.name, piece.split != "train", rules.bands)
            if rules.bands
            else None
        )

    def add(self, texts: Sequence[str], tokens: Sequence[Any]) -> None:
        hashes = [text_hash(text) for text in texts]
        self._hashes += hashes
        self._tokens += tokens
        self._size += sum(map(len, tokens))
        if self._near is not None:
            self._near.add(texts, hashes)
        if self._size >= _TOKENS_PER_PART:
            self._write()

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns what belongs into the account."""
        if self._hashes:
            self._write()
        return {"files": self._files, "near": self._near.finish() if self._near else []}

    def _write(self) -> None:
        name = f"{self.piece.name}-{len(self._files):04d}.arrow"
        buckets.write_part(self._folder / name, self._hashes, self._tokens, self._num_buckets)
        self._files.append(name)
        self._hashes, self._tokens, self._size = [], [], 0


def _sha256(piece: Piece) -> str | None:
    """Return the hash of a local file's bytes in the piece; None for a remote one.

    A Parquet file's pieces are row groups, not bytes: its first piece has the hash of all of it.
    """
    path = Path(piece.file.path)
    is_bytes = piece.file.format == "jsonl"
    if "://" in piece.file.path or not path.exists() or (piece.start and not is_bytes):
        return None
    start, end = (piece.start, piece.end) if is_bytes else (0, piece.file.size)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while start < end and (block := stream.read(min(2**20, end - start))):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()
