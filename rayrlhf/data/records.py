"""Records of JSONL and Parquet files: read, checked one by one, errors with file and line.

Kinds: `document` (text), `demonstration` (prompt + response, or messages), `comparison` (prompt,
responses, ranks; or chosen / rejected) and `prompt` (prompt, or messages). Extra columns are kept.
"""

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.config import RecipeError
from rayrlhf.data import builtin

Record = dict[str, Any]
Kind = Literal["document", "demonstration", "comparison", "prompt"]
MIN_RESPONSES, MAX_RESPONSES = 2, 9
_ROLES = ("system", "user", "assistant")


def read_records(path: str | Path, kind: Kind) -> list[Record]:
    """Return every record of `path`, checked and in one form.

    `path` is a `builtin:` name, a file, a folder or a glob. A `chosen` / `rejected` pair comes
    back as `responses` and `ranks`. Raises RecipeError with file and line of the first bad record.
    """
    return list(iter_records(path, kind))


def iter_records(path: str | Path, kind: Kind) -> Iterator[Record]:
    """Yield what `read_records` returns, holding one line (or one row group) at a time."""
    for file in files_of(path):
        empty = True
        for where, record in _raw_records(file):
            empty = False
            yield _CHECKS[kind](where, record)
        if empty:
            raise RecipeError(
                f"{file}: empty file, but at least one {kind} record is needed: "
                "write records to it or take it out of the recipe"
            )


def files_of(path: str | Path) -> list[Path]:
    """Return the files that `path` names, sorted; raises RecipeError when there is none."""
    name = builtin.resolve(str(path))
    file = Path(name)
    if file.is_file():
        return [file]
    if file.is_dir():
        found = [f for f in sorted(file.iterdir()) if f.suffix in (".jsonl", ".parquet")]
        if not found:
            raise RecipeError(
                f"{path}: no .jsonl or .parquet file in this folder: "
                "name the folder or the file that holds the records"
            )
        return found
    found = [Path(f) for f in sorted(glob.glob(name, recursive=True)) if Path(f).is_file()]
    if not found:
        raise RecipeError(
            f"{path}: no such file: correct the path in the recipe "
            f"(relative paths start at {Path.cwd()})"
        )
    return found


def parse_line(line: bytes, where: str) -> Record:
    """Return the object of one JSONL line; `where` (file:line) opens the message of an error."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{where}: invalid UTF-8 at byte {error.start + 1} of the line "
            f"(0x{line[error.start]:02x}): save the file as UTF-8, for example with "
            "iconv -f latin1 -t utf-8"
        ) from None
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{where}: broken JSON at column {error.colno} ({error.msg}): every line "
            "must be one complete JSON object"
        ) from None
    if b"\\ud" in line.lower():
        _no_half_characters(where, record)
    if not isinstance(record, dict):
        raise RecipeError(
            f"{where}: {type(record).__name__} instead of a JSON object: every line "
            'must be one record such as {"text": "..."}'
        )
    return record


def _no_half_characters(where: str, record: Any) -> None:
    """Refuse an escape such as \\ud83d without its second half, which no tokenizer can take."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RecipeError(
            f"{where}: {half} is half of a character (a surrogate without its "
            "partner): write the whole character or remove it"
        ) from None


def _raw_records(file: Path) -> Iterator[tuple[str, Record]]:
    """Yield (file:line, record) without looking at fields."""
    if file.suffix == ".parquet":
        yield from _parquet_records(file)
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                where = f"{file}:{number}"
                yield where, parse_line(line, where)


def _parquet_records(file: Path) -> Iterator[tuple[str, Record]]:
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise RecipeError(
            f"{file}: not a Parquet file ({error}): write it again, or give the "
            "file the ending .jsonl if it holds JSON lines"
        ) from None
    row = 0
    with table:
        for batch in table.iter_batches(batch_size=1024):
            for record in _rows_of(batch, f"{file}:{row + 1}"):
                row += 1
                # Parquet fills absent fields with null, which JSON lines simply leave out.
                yield f"{file}:{row}", {k: v for k, v in record.items() if v is not None}


def _rows_of(batch: pa.RecordBatch, where: str) -> list[Record]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        raise RecipeError(
            f"{where}: invalid UTF-8 in this row or one of the next "
            f"{batch.num_rows}: write the file with UTF-8 strings"
        ) from None


def _check_document(where: str, record: Record) -> Record:
    _text(where, record, "text", empty_is_fine=True)
    return record


def _check_demonstration(where: str, record: Record) -> Record:
    if "messages" in record:
        _messages(where, record, last="assistant")
        return record
    _text(where, record, "prompt", instead="messages")
    _text(where, record, "response")
    return record


def _check_prompt(where: str, record: Record) -> Record:
    if "messages" in record:
        _messages(where, record, last="user")
        return record
    _text(where, record, "prompt", instead="messages")
    return record


def _check_comparison(where: str, record: Record) -> Record:
    _text(where, record, "prompt")
    if "responses" not in record and ("chosen" in record or "rejected" in record):
        _text(where, record, "chosen")
        _text(where, record, "rejected")
        rest = {k: v for k, v in record.items() if k not in ("chosen", "rejected")}
        return {**rest, "responses": [record["chosen"], record["rejected"]], "ranks": [1, 2]}
    responses = _field(where, record, "responses", instead="chosen and rejected")
    if not isinstance(responses, list) or not all(isinstance(r, str) and r for r in responses):
        raise RecipeError(
            f"{where}: responses={_short(responses)} must be a list of non-empty "
            "strings: correct this record"
        )
    if not MIN_RESPONSES <= len(responses) <= MAX_RESPONSES:
        raise RecipeError(
            f"{where}: {len(responses)} responses, but K must be from "
            f"{MIN_RESPONSES} to {MAX_RESPONSES}: split or remove this record"
        )
    ranks = _field(where, record, "ranks")
    if not isinstance(ranks, list) or not all(type(r) is int and r >= 1 for r in ranks):
        raise RecipeError(
            f"{where}: ranks={_short(ranks)} must be a list of whole numbers from 1 "
            "(1 = best, ties allowed): correct this record"
        )
    if len(ranks) != len(responses):
        raise RecipeError(
            f"{where}: {len(ranks)} ranks for {len(responses)} responses: give every "
            "response one rank"
        )
    return record


_CHECKS: dict[Kind, Callable[[str, Record], Record]] = {
    "document": _check_document,
    "demonstration": _check_demonstration,
    "comparison": _check_comparison,
    "prompt": _check_prompt,
}


def _field(where: str, record: Record, field: str, instead: str = "") -> Any:
    if field not in record:
        other = f" (or {instead})" if instead else ""
        there = ", ".join(sorted(record)) or "nothing"
        raise RecipeError(
            f"{where}: the record has no field {field}{other}, only {there}: add it "
            "or rename the field"
        )
    return record[field]


def _text(
    where: str, record: Record, field: str, *, instead: str = "", empty_is_fine: bool = False
) -> None:
    value = _field(where, record, field, instead)
    if not isinstance(value, str):
        raise RecipeError(
            f"{where}: {field}={_short(value)} is {type(value).__name__}, not a "
            "string: write it in double quotes"
        )
    if not value and not empty_is_fine:
        raise RecipeError(f"{where}: {field} is empty: fill it or remove the record")


def _messages(where: str, record: Record, *, last: str) -> None:
    messages = record["messages"]
    rule = 'a list of {"role": "system" | "user" | "assistant", "content": "..."}'
    if not isinstance(messages, list) or not messages:
        raise RecipeError(f"{where}: messages={_short(messages)} must be {rule}: correct it")
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise RecipeError(
                f"{where}: the message {_short(message)} does not fit {rule}: correct it"
            )
    if messages[-1]["role"] != last:
        raise RecipeError(
            f"{where}: the last message is from {messages[-1]['role']}, but it must "
            f"be from {last}: add or remove a message"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
