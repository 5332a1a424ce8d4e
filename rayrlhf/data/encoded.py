"""Demonstrations, comparisons and prompts as token ids, encoded once and mapped into memory.

    pieces of files --read, check, chat template, length--> <run_dir>/.encoded/<key>/*.arrow

The key covers the records, the tokenizer and the limit of length, so a stage that starts again
finds its data. Small data is encoded in place; of large, pieces are tasks of a Ray Data job, and
neither the records nor their ids pass through the driver.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayrlhf import console, session
from rayrlhf.config import Recipe, RecipeError
from rayrlhf.data import inputs, records, storage
from rayrlhf.data.buckets import write_batches
from rayrlhf.data.datasets import (
    Comparison,
    Example,
    encode_comparison,
    encode_demonstration,
    encode_prompt,
)
from rayrlhf.data.job import Step
from rayrlhf.data.records import Kind, Record
from rayrlhf.data.storage import InputFile
from rayrlhf.data.tokenizer import load_tokenizer

BYTES_IN_PLACE = 32 * 2**20
"""Smaller data is encoded where it is needed, without a job; also what one task reads."""
_FORMAT = 4
_RECORDS_PER_BATCH = 1024
_SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("mask", pa.list_(pa.int8())),
        ("ranks", pa.list_(pa.int32())),
        ("kept", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("ratings", pa.list_(pa.float64())),
        ("single_ratings", pa.list_(pa.list_(pa.float64()))),
    ]
)
_OF_COMPARISONS = tuple(field.name for field in fields(Comparison))
Item = TypeVar("Item")


class Encoded(Sequence[Item], Generic[Item]):
    """Records as token ids in files mapped into memory; an item is made when it is taken."""

    def __init__(self, files: Sequence[Path], first: Sequence[int], make: "Make[Item]") -> None:
        """`first` are the numbers of the first record of each file's piece."""
        tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
        self._rows = [batch for table in tables for batch in table.to_batches()]
        self._first = [
            number for number, table in zip(first, tables, strict=True) for _ in table.to_batches()
        ]
        self._ends = np.cumsum([batch.num_rows for batch in self._rows])
        self._make = make
        counts = [_tokens_per_row(batch) for batch in self._rows]
        self.lengths: npt.NDArray[np.int64] = (
            np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)
        )
        """Tokens of each item, over all its sequences."""
        self.num_sequences: npt.NDArray[np.int64] = np.concatenate(
            [np.diff(batch.column("ids").offsets.to_numpy()) for batch in self._rows]
            or [np.zeros(0)]
        ).astype(np.int64)
        """Sequences of each item: 1, or the responses of a comparison."""
        self.key = files[0].parent.name if files else ""
        """Names the content: the same for the same records, tokenizer and limit of length."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._rows[place]
        row = index - (int(self._ends[place]) - batch.num_rows)
        fields = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
        fields["record"] += self._first[place]
        return self._make(fields)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


Make = Callable[[dict[str, Any]], Item]


def token_counts(items: Sequence[Any]) -> list[int]:
    """Return the tokens of each item without making it; of lists of ids, their lengths."""
    if isinstance(items, Encoded):
        return list(items.lengths.tolist())
    return [len(item) for item in items]


def demonstrations(recipe: Recipe, path: str, max_length: int) -> Encoded[Example]:
    """Return the demonstrations of `path`; raises RecipeError with file and line."""
    files, first = _encode(recipe, path, "demonstration", max_length)
    return Encoded(files, first, lambda row: Example(row["ids"][0], row["mask"], row["record"]))


def comparisons(
    recipe: Recipe,
    path: str,
    max_length: int,
    *,
    keep_ties: bool = False,
    need_single_ratings: bool = False,
) -> Encoded[Comparison]:
    """Return the comparisons of `path`; raises RecipeError with file and line.

    One that ranks no response above another is left out, unless `keep_ties`.
    """
    rules = {"keep_ties": keep_ties, "need_single_ratings": need_single_ratings}
    files, first = _encode(recipe, path, "comparison", max_length, rules)
    return Encoded(
        files,
        first,
        lambda row: Comparison(**{name: row[name] for name in _OF_COMPARISONS}),
    )


def prompts(recipe: Recipe, path: str, max_prompt_tokens: int) -> Encoded[list[int]]:
    """Return the prompts of `path` that fit; raises RecipeError with file and line."""
    files, first = _encode(recipe, path, "prompt", max_prompt_tokens)
    return Encoded(files, first, lambda row: list(row["ids"][0]))


def _encode(
    recipe: Recipe, path: str, kind: Kind, max_length: int, more: Mapping[str, bool] | None = None
) -> tuple[list[Path], list[int]]:
    """Encode what isn't yet; return the files and the number of each one's first record."""
    load_tokenizer(recipe)  # puts a named tokenizer into the run, or says that there is none
    tokenizer = (recipe.path / "tokenizer").resolve()
    content = (tokenizer / "tokenizer.json").read_bytes()
    content += (tokenizer / "tokenizer_config.json").read_bytes()
    template = tokenizer / "chat_template.jinja"
    content += template.read_bytes() if template.exists() else b""
    plan = [_FORMAT, storage.fingerprint(path), hashlib.sha256(content).hexdigest(), max_length]
    plan += [more or {}]
    key = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    folder = recipe.path.resolve() / ".encoded" / f"{kind}-{key}"
    done = folder / "account.json"
    if not done.exists():
        pieces = _pieces(path)
        items = {f"{piece['number']:06d}": piece for piece in pieces}
        rules = {
            "folder": str(folder),
            "tokenizer": str(tokenizer),
            "kind": kind,
            "max_length": max_length,
            **(more or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if sum(piece["file"][1] for piece in pieces if not piece["start"]) <= BYTES_IN_PLACE:
            accounts = [encode_piece(item, rules) for item in items.values()]
        else:
            session.connect(recipe)
            step = Step(
                f"{kind}s",
                lambda item, rules, _: encode_piece(item, rules),
                rules,
                None,
                folder / "accounts",
            )
            accounts = step.run(items, each=_raise_error)
        for account in accounts:
            _raise_error(account)
        with storage.replacing(done) as new:
            new.write_text(json.dumps(accounts), encoding="utf-8")
    accounts = json.loads(done.read_text(encoding="utf-8"))
    try:
        _report(path, kind, accounts, max_length)
    except RecipeError:
        shutil.rmtree(folder)
        raise
    totals = [account["records"] for account in accounts]
    first = [sum(totals[:number]) for number in range(len(totals))]
    return [folder / account["file"] for account in accounts], first


def encode_piece(piece: dict[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """Write the ids of one piece's records; return its counts, or the first error."""
    file = InputFile(*piece["file"])
    tokenizer = _tokenizer(rules["tokenizer"])
    name = f"{piece['number']:06d}.arrow"
    target = Path(rules["folder"]) / name
    counts = dict.fromkeys(("records", "written", "too_long", "no_pair"), 0)
    found = _rows(file, (piece["start"], piece["end"]), tokenizer, rules, counts)

    def batches() -> Iterator[pa.RecordBatch]:
        while batch := list(islice(found, _RECORDS_PER_BATCH)):
            counts["written"] += len(batch)
            yield pa.RecordBatch.from_pylist(batch, schema=_SCHEMA)

    try:
        write_batches(target, batches(), _SCHEMA)
        if not counts["records"] and piece["start"] == 0:
            raise records.empty_file(file, rules["kind"])
    except RecipeError as error:
        return {"error": str(error), "failed": True}
    return {"file": name, **counts}


def _rows(
    file: InputFile,
    span: tuple[int, int],
    tokenizer: PreTrainedTokenizerFast,
    rules: dict[str, Any],
    counts: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Yield rows of _SCHEMA and count; `record` counts from the piece's first."""
    for where, raw in inputs.read(file, span):
        record = records.check_exactly(file, where, raw, rules["kind"])
        if rules.get("need_single_ratings") and record.get("single_ratings") is None:
            raise RecipeError(
                f"{inputs.exact_place(file, where)}: the record has no single_ratings, but "
                "reward.raters=individual reads them: add them, or set reward.raters=mean"
            )
        try:
            row = _row(record, tokenizer, rules["kind"], rules["max_length"])
        except RecipeError as error:
            raise RecipeError(f"{inputs.exact_place(file, where)}: {error}") from None
        if row is None:
            counts["too_long"] += 1
        elif row["ranks"] and len(set(row["ranks"])) == 1 and not rules["keep_ties"]:
            counts["no_pair"] += 1
        else:
            yield {**row, "record": counts["records"]}
        counts["records"] += 1


def _row(
    record: Record, tokenizer: PreTrainedTokenizerFast, kind: Kind, max_length: int
) -> dict[str, Any] | None:
    empty: dict[str, Any] = {key: [] for key in _SCHEMA.names if key not in ("record", "ids")}
    empty["prompt_length"] = 0
    if kind == "demonstration":
        example = encode_demonstration(record, tokenizer, max_length)
        if example is None:
            return None
        return {**empty, "ids": [example.ids], "mask": example.mask}
    if kind == "comparison":
        ranked = encode_comparison(record, tokenizer, max_length)
        if ranked is None:
            return None
        return {**empty, **vars(ranked)}
    ids = encode_prompt(record, tokenizer)
    return {**empty, "ids": [ids]} if len(ids) <= max_length else None


def _pieces(path: str) -> list[dict[str, Any]]:
    found = [
        (file, span) for file in storage.find(path) for span in inputs.spans(file, BYTES_IN_PLACE)
    ]
    return [
        {
            "number": number,
            "file": [file.path, file.size, file.modified],
            "start": start,
            "end": end,
        }
        for number, (file, (start, end)) in enumerate(found)
    ]


def _raise_error(account: dict[str, Any]) -> None:
    if "error" in account:
        raise RecipeError(account["error"])


def _report(path: str, kind: Kind, accounts: Sequence[dict[str, Any]], max_length: int) -> None:
    """Say how many records were left out and why; raises RecipeError when none is left."""
    total, written, too_long, no_pair = (
        sum(account[key] for account in accounts)
        for key in ("records", "written", "too_long", "no_pair")
    )
    if too_long == total:
        raise RecipeError(
            f"none of {total} {kind}s fits into {max_length} tokens: raise "
            "model.max_length or shorten the texts"
        )
    if not written:
        raise RecipeError(
            f"{path}: no comparison ranks one response above another: give `ranks` that differ"
        )
    if too_long:
        console.say(
            f"data: {too_long} of {total} {kind}s are longer than {max_length} tokens: left out"
        )
    if no_pair:
        console.say(f"data: {no_pair} of {total} {kind}s rank all responses alike: left out")


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def _tokens_per_row(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    ids = batch.column("ids")
    ends = ids.values.offsets.to_numpy()[ids.offsets.to_numpy()]
    return np.diff(ends).astype(np.int64)
