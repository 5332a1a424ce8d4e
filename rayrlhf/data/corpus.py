"""The corpus stage on Ray Data: read -> clean -> dedup -> mix -> tokenize -> pack -> shards.

    pieces of files --map--> documents (hash, tokens) --group by hash bucket--> shards + account

The mixture is by epochs per source, as LLaMA's table gives it (arXiv:2302.13971); unlike there,
near-duplicates inside the training set stay, only exact ones go, and texts that are also held out.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
from ray.data.context import ShuffleStrategy

from rayrlhf import console, session
from rayrlhf.config import CorpusConfig, Recipe, RecipeError
from rayrlhf.data import documents
from rayrlhf.data.cleaning import TOO_SHORT, Cleaning
from rayrlhf.data.documents import NUM_EXAMPLES, Piece, Rules, text_hash
from rayrlhf.data.records import files_of, iter_records
from rayrlhf.data.tokenizer import load_tokenizer, save_tokenizer, source_of, train_tokenizer

BYTES_PER_PIECE = 32 * 2**20
"""Input that one read task holds."""
BYTES_PER_BUCKET = 128 * 2**20
"""Training input that is shuffled and packed in one piece (its tokens fit into 1 GiB)."""
CHARS_FOR_TOKENIZER = 200_000_000
"""The tokenizer is trained on a sample of about this size when the corpus is larger."""


@dataclass
class Inputs:
    """What the check of all input files found."""

    files: dict[tuple[str, str], list[Path]] = field(default_factory=dict)
    """Files per (source, split)."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 per file."""
    held_out: set[bytes] = field(default_factory=set)
    """Hashes of the cleaned texts of validation and test."""
    train_bytes: int = 0
    train_chars: int = 0


def build_corpus(recipe: Recipe) -> Path:
    """Write `<run_dir>/corpus`: Arrow shards of rows of T tokens, and manifest.json.

    All input is checked before Ray starts: raises RecipeError with file and line. Trains the
    tokenizer into `<run_dir>/tokenizer` unless the recipe names one.
    """
    config = recipe.corpus
    if config is None:
        raise RecipeError("the recipe has no corpus section: add corpus.sources")
    cleaning = Cleaning.of(config)
    inputs = check_inputs(config)
    if source_of(recipe) is None:
        trained = train_tokenizer(_tokenizer_texts(inputs, cleaning), recipe.tokenizer.vocab_size)
        save_tokenizer(trained, recipe.path / "tokenizer", origin="corpus")
    tokenizer = load_tokenizer(recipe)
    recipe.path.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".corpus-", dir=recipe.path.resolve()))
    try:
        rules = Rules(
            seed=recipe.seed,
            row_length=config.row_length,
            rows_per_shard=config.rows_per_shard,
            cleaning=cleaning,
            num_buckets=math.ceil(inputs.train_bytes / BYTES_PER_BUCKET),
            epochs={name: source.epochs for name, source in config.sources.items()},
            tokenizer=str((recipe.path / "tokenizer").resolve()),
            eos_id=int(tokenizer.eos_token_id),
            folder=str(new),
        )
        session.connect(recipe)
        accounts = _run(rules, pieces_of(inputs), inputs.held_out)
        manifest = _manifest(rules, inputs, accounts)
        _check_rows(manifest, config)
        _name_shards(new, manifest)
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _replace(new, recipe.path / "corpus")
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _report(manifest)
    return recipe.path / "corpus"


def check_inputs(config: CorpusConfig) -> Inputs:
    """Read every document of every file once; raises RecipeError with file and line."""
    inputs, cleaning = Inputs(), Cleaning.of(config)
    for name, source in config.sources.items():
        for split, path in (
            ("train", source.path),
            ("validation", source.validation),
            ("test", source.test),
        ):
            if path is None:
                continue
            files = inputs.files[name, split] = files_of(path)
            for file in files:
                inputs.hashes[str(file)] = _sha256(file)
                for record in iter_records(file, "document"):
                    if split == "train":
                        inputs.train_chars += len(record["text"])
                    else:
                        inputs.held_out.add(text_hash(cleaning.apply(record["text"])))
                if split == "train":
                    inputs.train_bytes += file.stat().st_size
    return inputs


def pieces_of(inputs: Inputs) -> list[Piece]:
    """Cut the input files into parts of about BYTES_PER_PIECE."""
    pieces = []
    for (source, split), files in inputs.files.items():
        for file in files:
            if file.suffix == ".parquet":
                groups = pq.ParquetFile(file).metadata.num_row_groups
                ends = list(range(1, groups + 1))
            else:
                size = file.stat().st_size
                ends = [*range(BYTES_PER_PIECE, size, BYTES_PER_PIECE), size]
            starts = [0, *ends[:-1]]
            pieces += [
                Piece(source, split, str(file.resolve()), start, end)
                for start, end in zip(starts, ends, strict=True)
            ]
    return pieces


def _run(rules: Rules, pieces: list[Piece], held_out: set[bytes]) -> list[dict[str, Any]]:
    """Execute the Ray Data pipeline; returns one account per group, in order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Sorting needs no actors: on two cores the hash shuffle spends its time on starting them.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    cpus = int(ray.cluster_resources().get("CPU", 1))
    items = [{"piece": json.dumps(asdict(piece))} for piece in pieces]
    # Small files share a task: a task costs more than to tokenize a megabyte.
    full = sum(piece.end - piece.start >= BYTES_PER_PIECE for piece in pieces)
    blocks = min(len(items), max(cpus, full))
    dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        documents.tokenize_pieces,
        batch_size=None,
        batch_format="numpy",
        fn_kwargs={"rules": rules, "held_out_ref": ray.put(frozenset(held_out))},
    )
    packed = dataset.groupby("group").map_groups(
        documents.pack_group, batch_format="pyarrow", fn_kwargs={"rules": rules}
    )
    accounts = [json.loads(row["account"]) for row in packed.take_all()]
    return sorted(accounts, key=lambda account: str(account["group"]))


def _tokenizer_texts(inputs: Inputs, cleaning: Cleaning) -> Iterator[str]:
    """Yield each training text once, or a sample of them by hash when there is too much."""
    share = min(1.0, CHARS_FOR_TOKENIZER / max(1, inputs.train_chars))
    seen = set(inputs.held_out)
    for (_, split), files in inputs.files.items():
        for file in files if split == "train" else []:
            for record in iter_records(file, "document"):
                text = cleaning.apply(record["text"])
                digest = text_hash(text)
                sampled = int.from_bytes(digest[8:], "big") < share * 2**64
                if sampled and digest not in seen and cleaning.reason(text) is None:
                    seen.add(digest)
                    yield text


def _manifest(rules: Rules, inputs: Inputs, accounts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the groups up per split, and check that every token is accounted for."""
    splits: dict[str, dict[str, Any]] = {}
    for account in accounts:
        split = str(account["group"]).partition("/")[0]
        total = splits.setdefault(
            split,
            {
                "rows": 0,
                "document_tokens": 0,
                "delimiters": 0,
                "tail_tokens_dropped": 0,
                "shards": [],
                "sources": {},
            },
        )
        for key in ("rows", "document_tokens", "delimiters", "tail_tokens_dropped", "shards"):
            total[key] += account[key]
        for source, counts in account["sources"].items():
            total["sources"][source] = _add(total["sources"].get(source), counts)
    for split, total in splits.items():
        tokens_in = total["document_tokens"] + total["delimiters"]
        tokens_out = total["rows"] * rules.row_length + total["tail_tokens_dropped"]
        assert tokens_in == tokens_out, f"{split}: {tokens_in} tokens in, {tokens_out} out"
    return {
        "format": 1,
        "seed": rules.seed,
        "row_length": rules.row_length,
        "eos_id": rules.eos_id,
        "epochs": dict(rules.epochs),
        "splits": splits,
        "tokenizer_sha256": _sha256(Path(rules.tokenizer) / "tokenizer.json"),
        "inputs": inputs.hashes,
    }


def _add(total: dict[str, Any] | None, counts: dict[str, Any]) -> dict[str, Any]:
    """Add nested counts, and keep the first examples."""
    if total is None:
        return counts
    added = dict(total)
    for key, value in counts.items():
        if isinstance(value, dict):
            added[key] = _add(total.get(key), value)
        elif isinstance(value, list):
            added[key] = [*total.get(key, []), *value][:NUM_EXAMPLES]
        else:
            added[key] = total[key] + value
    return added


def _check_rows(manifest: dict[str, Any], config: CorpusConfig) -> None:
    for split, total in manifest["splits"].items():
        if not total["rows"]:
            tokens = total["document_tokens"] + total["delimiters"]
            raise RecipeError(
                f"{split} has only {tokens} tokens, less than one row of "
                f"corpus.row_length={config.row_length}: add documents or lower it"
            )


def _name_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """Number the shards of each split from 0, in the order of the groups."""
    for split, total in manifest["splits"].items():
        for number, shard in enumerate(total["shards"]):
            name = f"{split}-{number:05d}.arrow"
            os.replace(folder / shard["file"], folder / name)
            shard["file"] = name


def _replace(new: Path, folder: Path) -> None:
    """Put the finished folder in place; what was there goes."""
    new.chmod(0o755)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=".corpus-", dir=folder.parent))
        os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old)
    else:
        os.replace(new, folder)


def _report(manifest: dict[str, Any]) -> None:
    found = [
        (split.partition("-")[0], source, counts)
        for split, total in manifest["splits"].items()
        for source, counts in total["sources"].items()
    ]
    # Those that every corpus has, and of the others those that dropped something.
    always = (TOO_SHORT, documents.HELD_OUT, documents.DUPLICATE)
    reasons = [
        reason
        for reason in found[0][2]["dropped"]
        if reason in always or any(counts["dropped"][reason] for _, _, counts in found)
    ]
    rows = [
        (
            split,
            source,
            counts["read"],
            *(counts["dropped"][reason] for reason in reasons),
            counts["in_mixture"],
            counts["tokens"],
        )
        for split, source, counts in found
    ]
    header = (
        "split",
        "source",
        "documents",
        *("- " + reason.replace("_", " ") for reason in reasons),
        "in mixture",
        "tokens",
    )
    console.say(console.table(header, rows))
    train = manifest["splits"]["train"]
    console.say(
        f"corpus: {train['rows']} rows of {manifest['row_length']} tokens = "
        f"{train['document_tokens']} document tokens + {train['delimiters']} delimiters "
        f"- {train['tail_tokens_dropped']} in an unfinished row"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
