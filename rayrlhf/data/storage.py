"""Files on any filesystem that pyarrow opens: find them, know them again, open them.

A path may be local, or a URI such as `s3://`, `gs://` or `hf://datasets/user/name`; it names a
file, a folder (with its subfolders) or a glob.
"""

import fnmatch
import gzip
import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa
from pyarrow import fs

from rayrlhf import console
from rayrlhf.config import RecipeError
from rayrlhf.data import builtin

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
_REMOTE_BLOCK = 4 * 2**20
"""Bytes that one request to a remote filesystem asks for."""
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
"""How data sets of the Hugging Face hub are called: user/name."""
_QUERY = re.compile(r"\?\w+=[^*?/\[]*$")


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


def find(path: str | Path) -> list[InputFile]:
    """Return the files that `path` names, sorted; raises RecipeError when there is none."""
    place = _locate(builtin.resolve(str(path)))
    try:
        info = place.system.get_file_info(place.path)
        if info.type == fs.FileType.File:
            return [_input_file(info, place)]
        if info.type == fs.FileType.Directory:
            below = _below(place.system, place.path)
            found = [i for i in below if _suffixes(i.path)[0] in _FORMATS]
            _report_ignored(path, below, found)
        else:
            found = _matching(place.system, place.path)
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be listed ({error}): check the address, the network and the "
            "credentials"
        ) from None
    if found:
        return sorted((_input_file(i, place) for i in found), key=lambda file: file.path)
    if info.type == fs.FileType.Directory:
        raise RecipeError(
            f"{path}: no {', '.join(_FORMATS)} file in this folder: "
            "name the folder or the file that holds the records"
        )
    of_the_hub = (
        f"; a data set of the Hugging Face hub is hf://datasets/{path}"
        if _HUB_NAME.fullmatch(str(path)) and not _suffixes(str(path))[0]
        else ""
    )
    raise RecipeError(
        f"{path}: no such file: correct the path in the recipe "
        f"(relative paths start at {Path.cwd()}{of_the_hub})"
    )


def fingerprint(path: str | Path) -> str:
    """Return a hash of the files that `path` names.

    Of local files up to BYTES_HASHED it covers the content, so that a copy or a new checkout is
    the same; of larger and remote ones size and time, because reading them takes too long. That
    there is no file is for whoever reads them to say.
    """
    try:
        files = find(path)
    except RecipeError:
        return "nothing"
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0".encode())
        if "://" in file.path or file.size > BYTES_HASHED:
            digest.update(str(file.modified).encode())
        else:
            with open(file.path, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def open_file(path: str) -> Any:
    """Return a local path or URI as a random-access pyarrow file."""
    place = _locate(path)
    return place.system.open_input_file(place.path)


def open_stream(file: InputFile) -> IO[bytes]:
    """Open for reading from the start, decompressed; what a broken stream still holds is read."""
    if "://" not in file.path:
        raw: IO[bytes] = open(file.path, "rb")  # noqa: SIM115
    else:
        # A stream that can seek: a piece of JSON lines begins anywhere in the file.
        raw = cast(IO[bytes], io.BufferedReader(open_file(file.path), _REMOTE_BLOCK))
    if file.compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if file.compression == "zstd":
        stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        return cast(IO[bytes], io.BufferedReader(_Forward(stream), 2**16))
    return raw


def _suffixes(path: str) -> tuple[str, str]:
    """Return (suffix of the format, suffix of the compression or '')."""
    pure = PurePosixPath(_QUERY.sub("", path.lower()))
    if pure.suffix in _COMPRESSIONS:
        return PurePosixPath(pure.stem).suffix, pure.suffix
    return pure.suffix, ""


@dataclass(frozen=True)
class _Place:
    """A path on a filesystem, and what makes a URI of a path there."""

    system: fs.FileSystem
    path: str
    before: str = ""
    after: str = ""

    def uri(self, path: str) -> str:
        """Return the name that `_locate` finds `path` by."""
        return f"{self.before}{path}{self.after}" if self.before else str(Path(path).absolute())


def _locate(name: str) -> _Place:
    scheme, mark, rest = name.partition("://")
    if not mark:
        return _Place(fs.LocalFileSystem(), name)
    # `?` is a pattern's, unless it begins options such as ?endpoint_override=host:port.
    options = found.group() if (found := _QUERY.search(rest)) else ""
    first, *parts = rest.removesuffix(options).split("/")
    try:
        system, root = _filesystem(f"{scheme}://{first or '/'}{options}")
    except (pa.ArrowInvalid, ValueError, ImportError, OSError) as error:
        raise RecipeError(
            f"{name}: no filesystem for this address ({str(error).partition(chr(10))[0]}): use a "
            "local path, or a URI that pyarrow opens, such as s3://bucket/folder"
        ) from None
    user = first[: first.rfind("@") + 1]
    before = "" if scheme == "file" else f"{scheme}://{user}"
    return _Place(system, "/".join([root.rstrip("/"), *parts]), before, options)


@lru_cache(maxsize=64)
def _filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a bucket or host, and the path of its root; connects once."""
    system, root = fs.FileSystem.from_uri(uri)
    return system, root


def _is_pattern(part: str) -> bool:
    return bool(set(part) & set("*?["))


def _input_file(info: fs.FileInfo, place: _Place) -> InputFile:
    return InputFile(place.uri(info.path), info.size or 0, info.mtime_ns or 0)


def _report_ignored(
    path: str | Path, below: Sequence[fs.FileInfo], found: Sequence[fs.FileInfo]
) -> None:
    """Say which files of a folder have an ending that names no format, hidden ones aside."""
    taken = {info.path for info in found}
    left = [i.path for i in below if i.path not in taken and not i.base_name.startswith((".", "_"))]
    if left:
        endings = sorted({"".join(PurePosixPath(p).suffixes[-2:]) or "no ending" for p in left})
        _warn_once(
            f"{path}: {len(left)} of {len(below)} files are left out, their ending names no format "
            f"({', '.join(endings[:5])}): read are {', '.join(_FORMATS)}, also .gz and .zst"
        )


@lru_cache(maxsize=1000)
def _warn_once(text: str) -> None:
    """Print a warning; a folder is listed several times in a run."""
    console.warn(text)


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to; it takes the place of `path` when it is on disk.

    The name is unique, since another try of the same task may be writing the same file.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield new
        with new.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


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
