"""Input files on any filesystem that pyarrow opens: find them, cut them into pieces, read them.

The ending names the format: JSON lines (`.jsonl`, `.json`, `.ndjson`), Parquet (`.parquet`), Common
Crawl's WARC and WET (`.warc`, `.wet`), and one document per file of text for everything else; all
but Parquet also compressed (`.gz`, `.zst`). A path may be local, or a URI such as `s3://`, `gs://`
or `hf://datasets/user/name`; it names a file, a folder (read with its subfolders) or a glob.
"""

import fnmatch
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rayrlhf.config import RecipeError
from rayrlhf.data import builtin

Record = dict[str, Any]
OnError = Callable[[RecipeError], None]
"""What to do about a record or file that can't be read; reading goes on when it returns."""
MAX_RECORD_BYTES = 64 * 2**20
"""Longer lines and text files are not documents; they would fill a worker's memory."""
BYTES_HASHED = 256 * 2**20
"""Larger files are known by size and time of their last change."""
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".wet": "warc",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_AT_BYTE = " at byte "
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    path: str
    """Local path or URI."""
    size: int
    """Bytes."""
    modified: int
    """Time of the last change, ns; 0 where the filesystem doesn't tell."""

    @property
    def format(self) -> str:
        """`jsonl`, `parquet`, `warc` or `text`, by the ending."""
        return _FORMATS.get(_suffixes(self.path)[0], "text")

    @property
    def compression(self) -> str | None:
        """`gzip`, `zstd` or None, by the ending."""
        return _COMPRESSIONS.get(_suffixes(self.path)[1])

    def __str__(self) -> str:
        return self.path


def raise_error(error: RecipeError) -> None:
    """Stop at the first record that can't be read."""
    raise error


def find(path: str | Path) -> list[InputFile]:
    """Return the files that `path` names, sorted; raises RecipeError when there is none."""
    name = builtin.resolve(str(path))
    system, inner, prefix = _filesystem(name)
    try:
        info = system.get_file_info(inner)
        if info.type == fs.FileType.File:
            return [_input_file(info, prefix)]
        if info.type == fs.FileType.Directory:
            found = [i for i in _below(system, inner) if _suffixes(i.path)[0] in _FORMATS]
        else:
            found = _matching(system, inner)
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be listed ({error}): check the address, the network and the "
            "credentials"
        ) from None
    if found:
        return sorted((_input_file(i, prefix) for i in found), key=lambda file: file.path)
    if info.type == fs.FileType.Directory:
        raise RecipeError(
            f"{path}: no {', '.join(_FORMATS)} file in this folder: "
            "name the folder or the file that holds the records"
        )
    raise RecipeError(
        f"{path}: no such file: correct the path in the recipe "
        f"(relative paths start at {Path.cwd()})"
    )


def fingerprint(path: str | Path) -> str:
    """Return a hash of the files that `path` names.

    Of local files up to BYTES_HASHED it covers the content, so that a copy or a new checkout is
    the same; of larger and remote ones size and time, because reading them takes too long.
    """
    digest = hashlib.sha256()
    for file in find(path):
        digest.update(f"{file.path}\0{file.size}\0".encode())
        if "://" in file.path or file.size > BYTES_HASHED:
            digest.update(str(file.modified).encode())
        else:
            with open(file.path, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


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
    if b"\\ud" in line.lower():
        _no_half_characters(where, record)
    if not isinstance(record, dict):
        raise RecipeError(
            f"{where}: {type(record).__name__} instead of a JSON object: every line "
            'must be one record such as {"text": "..."}'
        )
    return record


def exact_place(file: InputFile, where: str) -> str:
    """Return `where` as file:line; a record of a later span has only its byte at first.

    Counting the lines before takes time, so this is for what goes wrong.
    """
    path, mark, byte = where.rpartition(_AT_BYTE)
    if not mark:
        return where
    lines, left = 0, int(byte)
    with _open_stream(file) as stream:
        while left and (block := stream.read(min(left, 2**24))):
            lines += block.count(b"\n")
            left -= len(block)
    return f"{path}:{lines + 1}"


def open_file(path: str) -> Any:
    """Return a local path or URI as a random-access pyarrow file."""
    system, inner, _ = _filesystem(path)
    return system.open_input_file(inner)


def _suffixes(path: str) -> tuple[str, str]:
    """Return (suffix of the format, suffix of the compression or '')."""
    pure = PurePosixPath(path.lower())
    if pure.suffix in _COMPRESSIONS:
        return PurePosixPath(pure.stem).suffix, pure.suffix
    return pure.suffix, ""


def _filesystem(name: str) -> tuple[fs.FileSystem, str, str]:
    """Return (filesystem, path on it, what to put before a path on it to get a URI)."""
    scheme, mark, rest = name.partition("://")
    if not mark:
        return fs.LocalFileSystem(), name, ""
    # A pattern is no URI: `?` begins a query there.
    parts = rest.split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    try:
        system, inner = fs.FileSystem.from_uri(f"{scheme}://{'/'.join(parts[:fixed])}")
    except (pa.ArrowInvalid, ValueError, ImportError, OSError) as error:
        raise RecipeError(
            f"{name}: no filesystem for this address ({str(error).partition(chr(10))[0]}): use a "
            "local path, or a URI that pyarrow opens, such as s3://bucket/folder"
        ) from None
    prefix = "" if scheme == "file" else f"{scheme}://"
    return system, "/".join([inner.rstrip("/"), *parts[fixed:]]), prefix


def _is_pattern(part: str) -> bool:
    return bool(set(part) & set("*?["))


def _input_file(info: fs.FileInfo, prefix: str) -> InputFile:
    path = info.path if prefix else str(Path(info.path).absolute())
    return InputFile(prefix + path, info.size or 0, info.mtime_ns or 0)


def _below(system: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    found = system.get_file_info(fs.FileSelector(folder, recursive=True))
    return [info for info in found if info.type == fs.FileType.File]


def _matching(system: fs.FileSystem, pattern: str) -> list[fs.FileInfo]:
    """Return the files below the pattern's fixed part that match it; `**` crosses folders."""
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), None)
    if fixed is None:
        return []
    folder = "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")
    if system.get_file_info(folder).type != fs.FileType.Directory:
        return []
    wanted = parts[fixed:]
    depth = len(PurePosixPath(folder).parts)
    return [
        info
        for info in _below(system, folder)
        if _matches(list(PurePosixPath(info.path).parts[depth:]), wanted)
    ]


def _matches(parts: list[str], wanted: list[str]) -> bool:
    if not wanted or not parts:
        return not parts and all(want == "**" for want in wanted)
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _open_stream(file: InputFile) -> IO[bytes]:
    """Open for reading from the start, decompressed; what a broken stream still holds is read."""
    if "://" not in file.path:
        raw: IO[bytes] = open(file.path, "rb")  # noqa: SIM115
    else:
        system, inner, _ = _filesystem(file.path)
        raw = cast(IO[bytes], io.BufferedReader(_Forward(system.open_input_stream(inner)), 2**20))
    if file.compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if file.compression == "zstd":
        stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        return cast(IO[bytes], io.BufferedReader(_Forward(stream), 2**16))
    return raw


class _Forward(io.RawIOBase):
    """A stream of pyarrow as one of Python that goes forward only."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._stream.readinto(buffer))
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


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
    with _open_stream(file) as stream:
        if start and not whole:
            stream.seek(start - 1)
            _skip_line(stream)  # the end of the line before
            position = stream.tell()
        else:
            position = 0
        number = 1
        while whole or position < end:
            line = stream.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            here, position = position, position + len(line)
            where = f"{file}{_AT_BYTE}{here}" if start else f"{file}:{number}"
            if len(line) > MAX_RECORD_BYTES:
                position += _skip_line(stream)
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
    with _open_stream(file) as opened:
        # fastwarc decompresses too, but doesn't say when a stream ends too early.
        stream = _UntilBroken(opened)
        pages = ArchiveIterator(stream, record_types=wanted, max_content_length=MAX_RECORD_BYTES)
        for number, page in enumerate(pages, start=1):
            where = f"{file}:{number}"
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
    with _open_stream(file) as stream:
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
