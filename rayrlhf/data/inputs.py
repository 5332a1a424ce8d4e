"""Records out of input files: cut a file into spans, and read one, whatever the format.

The ending names the format: JSON lines (`.jsonl`, `.json`, `.ndjson`), Parquet (`.parquet`), Common
Crawl's WARC and WET (`.warc`, `.wet`), and one document per file of text for everything else; all
but Parquet also compressed (`.gz`, `.zst`).
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrlhf.config import RecipeError
from rayrlhf.data.storage import InputFile, open_file, open_stream

Record = dict[str, Any]
OnError = Callable[[RecipeError], None]
"""What to do about a record or file that can't be read; reading goes on when it returns."""
MAX_RECORD_BYTES = 64 * 2**20
"""Longer lines and text files are not documents; they would fill a worker's memory."""
_AFTER_BYTE = " after byte "
_BOM = b"\xef\xbb\xbf"


def raise_error(error: RecipeError) -> None:
    """Stop at the first record that can't be read."""
    raise error


def spans(file: InputFile, bytes_per_piece: int) -> list[tuple[int, int]]:
    """Cut a file into (start, end): bytes of plain JSON lines, row groups of Parquet, else whole.

    A line belongs to the span that holds its first byte. Raises RecipeError for a Parquet file
    whose footer can't be read.
    """
    if file.format == "parquet":
        with _parquet(file) as table:
            groups = [
                table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)
            ]
        ends, filled = [], 0
        for number, size in enumerate(groups, start=1):
            filled += size
            if filled >= bytes_per_piece or number == len(groups):
                ends.append(number)
                filled = 0
    elif file.format == "jsonl" and file.compression is None:
        ends = [*range(bytes_per_piece, file.size, bytes_per_piece), file.size]
    else:
        ends = [file.size]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def read(
    file: InputFile,
    span: tuple[int, int] | None = None,
    *,
    columns: list[str] | None = None,
    on_error: OnError = raise_error,
) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) for every record of a span (None: all); `where` is file:line, or a
    form of it that `exact_place` turns into that.

    `columns` are those of a Parquet file that are needed. What can't be read goes to `on_error`
    as a RecipeError that names file, line, reason and fix: a record, or the rest of the file.
    """
    try:
        if file.format == "jsonl":
            yield from _json_lines(file, span, on_error)
        elif file.format == "parquet":
            yield from _parquet_rows(file, span, columns, on_error)
        elif file.format == "warc":
            yield from _pages(file, on_error)
        else:
            yield from _text(file, on_error)
    except FileNotFoundError:
        on_error(RecipeError(f"{file}: vanished since it was listed: put it back, or leave it out"))
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        reason = str(error).strip().partition("\n")[0]
        on_error(
            RecipeError(
                f"{file}: cannot be read to its end ({reason}): get the file again, or leave it out"
            )
        )


def parse_line(line: bytes, where: str) -> Record:
    """Return the object of one JSON line; `where` (file:line) opens the message of an error."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, line, error) from None
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{where}: broken JSON at column {error.colno} ({error.msg}): every line "
            "must be one complete JSON object"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where}: JSON that Python can't hold ({error}): correct or remove this record"
        ) from None
    if b"\\ud" in line.lower():
        _no_half_characters(where, record)
    if not isinstance(record, dict):
        raise RecipeError(
            f"{where}: {type(record).__name__} instead of a JSON object: every line "
            'must be one record such as {"text": "..."}'
        )
    return record


def exact_place(file: InputFile, where: str) -> str:
    """Return `where` as file:line; a record of a later span only has its line there at first.

    Counting the lines before takes time, so this is for what goes wrong.
    """
    path, mark, place = where.rpartition(_AFTER_BYTE)
    if not mark:
        return where
    byte, _, number = place.partition(":")
    return f"{path}:{_lines_before(file, int(byte)) + int(number)}"


@lru_cache(maxsize=64)
def _lines_before(file: InputFile, byte: int) -> int:
    lines = 0
    with open_stream(file) as stream:
        while byte and (block := stream.read(min(byte, 2**24))):
            lines += block.count(b"\n")
            byte -= len(block)
    return lines


class _UntilBroken(io.RawIOBase):
    """Ends where `stream` breaks, and keeps the error: fastwarc can't pass one on."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read1(size)  # type: ignore[attr-defined]
        except (OSError, EOFError, zlib.error) as error:
            self.error = error
            return b""

    def tell(self) -> int:
        return self._stream.tell()


def _json_lines(
    file: InputFile, span: tuple[int, int] | None, on_error: OnError
) -> Iterator[tuple[str, Record]]:
    start, end = span or (0, file.size)
    whole = file.compression is not None  # positions in it are not those of the file
    with open_stream(file) as stream:
        if start and not whole:
            stream.seek(start - 1)
            _skip_line(stream)  # the end of the line before
            position = stream.tell()
        else:
            position = 0
        origin, number = position, 1
        while whole or position < end:
            line = stream.readline(MAX_RECORD_BYTES + 2)
            if not line:
                return
            here, position = position, position + len(line)
            where = f"{file}{_AFTER_BYTE}{origin}:{number}" if origin else f"{file}:{number}"
            if len(line.rstrip(b"\r\n")) > MAX_RECORD_BYTES:
                position += 0 if line.endswith(b"\n") else _skip_line(stream)
                on_error(_too_long(exact_place(file, where)))
            elif stripped := line.removeprefix(_BOM if here == 0 else b"").strip():
                try:
                    record = parse_line(stripped, where)
                except RecipeError as error:
                    place = exact_place(file, where)
                    on_error(RecipeError(str(error).replace(where, place, 1)))
                else:
                    yield where, record
            number += 1


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line without holding it; returns its bytes."""
    skipped = 0
    while part := stream.readline(2**20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _parquet(file: InputFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(open_file(file.path))
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise RecipeError(
            f"{file}: not a Parquet file ({error}): write it again, or give the "
            "file the ending .jsonl if it holds JSON lines"
        ) from None


def _parquet_rows(
    file: InputFile,
    span: tuple[int, int] | None,
    columns: list[str] | None,
    on_error: OnError,
) -> Iterator[tuple[str, Record]]:
    try:
        table = _parquet(file)
    except RecipeError as error:
        on_error(error)
        return
    with table:
        there = table.schema_arrow.names
        if columns is not None and (missing := [name for name in columns if name not in there]):
            on_error(
                RecipeError(
                    f"{file}: no column {missing[0]}, only {', '.join(there)}: rename the column, "
                    "or leave the file out"
                )
            )
            return
        start, end = span or (0, table.num_row_groups)
        row = sum(table.metadata.row_group(i).num_rows for i in range(start))
        for batch in table.iter_batches(
            batch_size=1024, row_groups=range(start, end), columns=columns
        ):
            try:
                records = batch.to_pylist()
            except UnicodeDecodeError:
                records = list(_decodable(batch, f"{file}", row, on_error))
            for offset, record in enumerate(records, start=1):
                # Parquet fills absent fields with null, which JSON lines simply leave out.
                if record is not None:
                    filled = {k: v for k, v in record.items() if v is not None}
                    yield f"{file}:{row + offset}", filled
            row += batch.num_rows


def _decodable(
    batch: pa.RecordBatch, file: str, row: int, on_error: OnError
) -> Iterator[Record | None]:
    """Yield the rows of a batch in which a string is not UTF-8; None for such a row."""
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            on_error(
                RecipeError(
                    f"{file}:{row + index + 1}: invalid UTF-8 in this row: write the file with "
                    "UTF-8 strings"
                )
            )
            yield None


def _pages(file: InputFile, on_error: OnError) -> Iterator[tuple[str, Record]]:
    """Yield the plain text of WET conversions, and the visible text of WARC's HTML responses."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    wanted = WarcRecordType.conversion | WarcRecordType.response
    with open_stream(file) as opened:
        # fastwarc decompresses too, but doesn't say when a stream ends too early.
        stream = _UntilBroken(opened)
        for number, page in enumerate(ArchiveIterator(stream, record_types=wanted), start=1):
            where = f"{file}:{number}"
            if page.content_length > MAX_RECORD_BYTES:
                on_error(_too_long(where))
                continue
            url = page.headers.get("WARC-Target-URI", "")
            body = page.reader.read()
            if page.record_type == WarcRecordType.conversion:
                try:
                    text = body.decode("utf-8")
                except UnicodeDecodeError as error:
                    on_error(_not_utf8(where, body, error))
                    continue
            elif "html" in (page.http_content_type or ""):
                html = bytes_to_str(body, page.http_charset or detect_encoding(body) or "utf-8")
                text = extract_plain_text(html, main_content=True)
            else:
                continue
            yield where, {"text": text, "url": url}
        if stream.error is not None:
            raise stream.error


def _text(file: InputFile, on_error: OnError) -> Iterator[tuple[str, Record]]:
    with open_stream(file) as stream:
        content = stream.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        on_error(_too_long(f"{file}"))
    elif b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        on_error(
            RecipeError(
                f"{file}:{line}: NUL bytes, so this is not a text file: convert or remove it"
            )
        )
    else:
        try:
            text = content.removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            on_error(_not_utf8(f"{file}:{line}", content, error))
        else:
            yield f"{file}:1", {"text": text}


def _too_long(where: str) -> RecipeError:
    return RecipeError(
        f"{where}: more than {MAX_RECORD_BYTES // 2**20} MiB in one record: cut it into documents, "
        "one per line or file"
    )


def _not_utf8(where: str, line: bytes, error: UnicodeDecodeError) -> RecipeError:
    begin = line.rfind(b"\n", 0, error.start) + 1
    return RecipeError(
        f"{where}: invalid UTF-8 at byte {error.start - begin + 1} of the line "
        f"(0x{line[error.start]:02x}): save the file as UTF-8, for example with "
        "iconv -f latin1 -t utf-8"
    )


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
