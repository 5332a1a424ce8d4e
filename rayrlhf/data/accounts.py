"""What became of every document and token of a corpus: the manifest, its checks and its table."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayrlhf import console
from rayrlhf.config import CorpusConfig, RecipeError
from rayrlhf.data.buckets import DUPLICATE, HELD_OUT, NEAR_DUPLICATE, NEAR_HELD_OUT
from rayrlhf.data.documents import NUM_EXAMPLES, Piece, TextRules, encoder_of
from rayrlhf.data.mixture import MixtureRules

MANIFEST = "manifest.json"
NUM_SHOWN = 100
"""Files with errors that are printed; the manifest has all."""
_TOTALS = ("rows", "document_tokens", "delimiters", "padding", "tail_tokens_dropped", "shards")
_MIXED = (
    "kept",
    "kept_tokens",
    "repeated_tokens",
    "sampled_out_tokens",
    "in_mixture",
    "tokens",
)

Account = Mapping[str, Any]


def check_errors(pieces: Sequence[Piece], read: Sequence[Account]) -> None:
    """Raise RecipeError with what could not be read."""
    if shown := errors_by_file(pieces, read):
        fix = "or set corpus.on_error=skip to go on without what can't be read"
        raise RecipeError("\n".join([*shown, fix]))


def report_errors(pieces: Sequence[Piece], read: Sequence[Account], lacking: Sequence[str]) -> None:
    """Print what could not be read and is left out, a line per file."""
    if shown := [*lacking, *errors_by_file(pieces, read)]:
        console.warn("corpus: left out, because it can't be read:")
        for line in shown[:NUM_SHOWN]:
            console.warn(f"  {line}")
        if len(shown) > NUM_SHOWN:
            console.warn(f"  ... and {len(shown) - NUM_SHOWN} more files, all in {MANIFEST}")


def errors_by_file(pieces: Sequence[Piece], read: Sequence[Account]) -> list[str]:
    """Return a line for every file with errors: the first, and how many more there are."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for account in read:
        if account["errors"]:
            path = pieces[account["piece"]].file.path
            first.setdefault(path, account["errors"][0])
            count[path] += account["num_errors"]
    return [
        text + (f" (and {count[path] - 1} more in this file)" if count[path] > 1 else "")
        for path, text in first.items()
    ]


def is_complete(folder: Path, plan: str) -> bool:
    """Tell whether the corpus in `folder` was written by this plan, and all of it is there."""
    path = folder / MANIFEST
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    shards = [shard for split in found["splits"].values() for shard in split["shards"]]
    return found.get("plan_sha256") == plan and all((folder / s["file"]).exists() for s in shards)


def manifest(
    pieces: Sequence[Piece],
    read: Sequence[Account],
    packed: Sequence[Account],
    text_rules: TextRules,
    mixture: MixtureRules,
    config: CorpusConfig,
) -> dict[str, Any]:
    """Add the accounts up per split and source; every document and token has one place.

    A split with less than a row is an error: raises RecipeError, or, with `on_error: skip`, leaves
    out a held-out one.
    """
    errors = errors_by_file(pieces, read)
    num_errors = sum(account["num_errors"] for account in read)
    splits = _splits(read, packed, text_rules)
    for split, total in list(splits.items()):
        _check_split(split, total, mixture.row_length)
        if not total["rows"]:
            tokens = total["document_tokens"] + total["delimiters"]
            reason = (
                f"{split} has only {tokens} tokens, less than one row of "
                f"corpus.row_length={mixture.row_length}: add documents or lower it"
            )
            if split == "train" or not text_rules.skip_errors:
                raise RecipeError(reason)
            console.warn(f"corpus: left out: {reason}")
            errors.append(reason)
            num_errors += 1
            del splits[split]
    if "train" not in splits:
        raise RecipeError("no training document is left: look at what the rules drop, and why")
    rules = config.model_dump(mode="json")
    return {
        "format": 2,
        "seed": mixture.seed,
        "row_length": mixture.row_length,
        "packing": mixture.packing,
        "eos_id": mixture.eos_id,
        "vocab_size": encoder_of(mixture.tokenizer).tokenizer.get_vocab_size(),
        "epochs": dict(mixture.epochs),
        "rules": rules,
        "rules_sha256": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
        "splits": splits,
        "tokenizer_sha256": sha256(Path(mixture.tokenizer) / "tokenizer.json"),
        "inputs": _inputs(pieces, read),
        "errors": errors,
        "num_errors": num_errors,
    }


def report(manifest: Mapping[str, Any]) -> None:
    """Print a row per split and source, and what each rule dropped."""
    found = [
        (split.partition("-")[0], source, counts, total["document_tokens"])
        for split, total in manifest["splits"].items()
        for source, counts in total["sources"].items()
    ]
    rows = [
        (
            split,
            source,
            counts["read"],
            sum(counts["dropped"].values()),
            counts["in_mixture"],
            counts["tokens"],
            f"{100 * counts['tokens'] / max(1, tokens):.1f}%",
            counts["bytes"] / max(1, counts["tokens_read"]),
            counts["tokens_read"] / max(1, counts["words"]),
        )
        for split, source, counts, tokens in found
    ]
    header = (
        "split",
        "source",
        "documents",
        "dropped",
        "in mixture",
        "tokens",
        "share",
        "bytes/token",
        "tokens/word",
    )
    console.say(console.table(header, rows))
    dropped: dict[str, dict[str, int]] = {}
    for _, source, counts, _ in found:
        for reason, count in counts["dropped"].items():
            if count:
                by_source = dropped.setdefault(reason, {})
                by_source[source] = by_source.get(source, 0) + count
    for reason, by_source in dropped.items():
        listed = ", ".join(f"{source} {count}" for source, count in by_source.items())
        console.say(f"corpus: dropped as {reason.replace('_', ' ')}: {listed}")
    train = manifest["splits"]["train"]
    filled = f" + {train['padding']} padding" if train["padding"] else ""
    console.say(
        f"corpus: {train['rows']} rows of {manifest['row_length']} tokens = "
        f"{train['document_tokens']} document tokens + {train['delimiters']} delimiters{filled} "
        f"- {train['tail_tokens_dropped']} in an unfinished row"
    )


def sha256(file: Path) -> str:
    """Return the hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _splits(
    read: Sequence[Account], packed: Sequence[Account], rules: TextRules
) -> dict[str, dict[str, Any]]:
    near = [NEAR_DUPLICATE, NEAR_HELD_OUT] if rules.bands else []
    later = [HELD_OUT, *near, DUPLICATE]
    splits: dict[str, dict[str, Any]] = {}
    for account in packed:
        total = splits.setdefault(account["split"], {**_zeros(), "sources": {}})
        for key in _TOTALS:
            total[key] += account[key]
    for account in read:
        train = account["split"] == "train"
        split = "train" if train else f"{account['split']}-{account['source']}"
        total = splits.setdefault(split, {**_zeros(), "sources": {}})
        counts = total["sources"].setdefault(account["source"], _no_documents(rules, later))
        for key in ("read", "bytes", "words"):
            counts[key] += account[key]
        counts["tokens_read"] += account["tokens"]
        _add(counts["dropped"], account["dropped"])
        _quote(counts["examples"], account["examples"])
    for account in packed:
        for source, found in account["sources"].items():
            counts = splits[account["split"]]["sources"][source]
            for key in ("dropped", "dropped_tokens"):
                _add(counts[key], found[key])
            for key in _MIXED:
                counts[key] += found[key]
            _quote(counts["examples"], found["examples"])
    return splits


def _zeros() -> dict[str, Any]:
    return {key: [] if key == "shards" else 0 for key in _TOTALS}


def _no_documents(rules: TextRules, later: Sequence[str]) -> dict[str, Any]:
    return {
        "read": 0,
        "bytes": 0,
        "words": 0,
        "tokens_read": 0,
        "dropped": dict.fromkeys([*rules.reasons, *later], 0),
        "dropped_tokens": dict.fromkeys(later, 0),
        "examples": {},
        **dict.fromkeys(_MIXED, 0),
    }


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for reason, count in counts.items():
        total[reason] += count


def _quote(total: dict[str, list[str]], examples: Mapping[str, Sequence[str]]) -> None:
    for reason, quotes in examples.items():
        total[reason] = [*total.get(reason, []), *quotes][:NUM_EXAMPLES]


def _check_split(split: str, total: Account, row_length: int) -> None:
    """Hold the books to account: documents and tokens, exactly."""
    balances = {
        "tokens of rows": (
            total["document_tokens"] + total["delimiters"] + total["padding"],
            total["rows"] * row_length + total["tail_tokens_dropped"],
        ),
        "tokens of the mixture": (
            total["document_tokens"],
            sum(counts["tokens"] for counts in total["sources"].values()),
        ),
    }
    for source, counts in total["sources"].items():
        balances[f"documents of {source}"] = (
            counts["read"],
            counts["kept"] + sum(counts["dropped"].values()),
        )
        balances[f"tokens of {source}"] = (
            counts["tokens_read"],
            counts["kept_tokens"] + sum(counts["dropped_tokens"].values()),
        )
        balances[f"tokens of {source} in the mixture"] = (
            counts["kept_tokens"] + counts["repeated_tokens"],
            counts["tokens"] + counts["sampled_out_tokens"],
        )
    for what, (came, went) in balances.items():
        if came != went:
            raise AssertionError(f"{split}, {what}: {came} in, {went} out")


def _inputs(pieces: Sequence[Piece], read: Sequence[Account]) -> dict[str, Any]:
    """Return size, time of change and hashes (one per piece; none of remote ones) of every file."""
    found: dict[str, Any] = {}
    for piece, account in zip(pieces, read, strict=True):
        entry = found.setdefault(
            piece.file.path,
            {"size": piece.file.size, "modified": piece.file.modified, "sha256": []},
        )
        if account["sha256"] is not None:
            entry["sha256"].append(account["sha256"])
    return found
