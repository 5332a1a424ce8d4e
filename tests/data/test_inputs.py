"""Every format and filesystem gives the same records; every broken file is named, the rest kept."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from rayrlhf.config import RecipeError
from rayrlhf.data import inputs, storage
from rayrlhf.data.inputs import read, spans
from rayrlhf.data.storage import InputFile, find

TEXTS = ["one", "two\nlines", "touch\u00e9 \U0001f600"]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def texts_of(path: Path | str) -> list[str]:
    return [record["text"] for file in find(path) for _, record in read(file)]


def what_is_read(file: InputFile) -> tuple[list[str], list[str]]:
    """Return (texts, errors)."""
    errors: list[RecipeError] = []
    texts = [record["text"] for _, record in read(file, on_error=errors.append)]
    return texts, [str(error) for error in errors]


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_json_lines_plain_and_compressed(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + lines(TEXTS[:1]) + b"\n" + lines(TEXTS[1:])))
    assert texts_of(path) == TEXTS
    assert [where for where, _ in read(find(path)[0])] == [f"{path}:{n}" for n in (1, 3, 4)]


def test_gzip_of_several_members_as_pigz_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TEXTS)) + gzip.compress(lines(TEXTS)))
    assert texts_of(path) == TEXTS * 2


def test_a_folder_is_read_with_its_subfolders_and_files_of_text_are_documents(
    tmp_path: Path,
) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / "b/c/1.txt").write_text(TEXTS[1], encoding="utf-8")
    (tmp_path / "b/2.md.gz").write_bytes(gzip.compress(TEXTS[2].encode()))
    (tmp_path / "b/notes.log").write_text("left alone")
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:1]))
    assert texts_of(tmp_path) == [TEXTS[0], TEXTS[2], TEXTS[1]]
    assert texts_of(tmp_path / "b" / "*.log") == ["left alone"]  # asked for by name


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["0.txt"]),
        ("**/*.txt", ["0.txt", "a/1.txt", "a/b/2.txt"]),
        ("a/*/?.txt", ["a/b/2.txt"]),
        ("a/[1].txt", ["a/1.txt"]),
        ("a/**", ["a/1.txt", "a/b/2.txt"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("0.txt", "a/1.txt", "a/b/2.txt"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path / pattern) == expected
    assert texts_of(f"file://{tmp_path}/{pattern}") == expected


def test_addresses(tmp_path: Path) -> None:
    file = f"file://{tmp_path}/a.jsonl.gz"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    assert texts_of(file) == TEXTS
    with pytest.raises(RecipeError, match=r"nosuch://x/y: no filesystem for this address"):
        find("nosuch://x/y")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"no such file"),
        (lambda folder: (folder / "x").mkdir(), r"no \.jsonl, .* file in this folder"),
    ],
)
def test_nothing_to_read(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    with pytest.raises(RecipeError, match=message):
        find(tmp_path / "x")


def test_a_name_of_the_hub_says_its_address() -> None:
    with pytest.raises(RecipeError, match=r"no such file.*hf://datasets/Anthropic/hh-rlhf\)"):
        find("Anthropic/hh-rlhf")
    with pytest.raises(RecipeError, match="no such file") as error:
        find("data/train.jsonl")
    assert "hf://" not in str(error.value)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=12), st.integers(1, 60))
def test_every_line_is_in_exactly_one_span(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], step: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(lines(texts))
    file = find(path)[0]
    found = [record["text"] for span in spans(file, step) for _, record in read(file, span)]
    assert found == texts


def test_parquet_spans_are_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": list("abcde"), "x": [1] * 5}), path, row_group_size=2)
    file = find(path)[0]
    assert spans(file, 1) == [(0, 1), (1, 2), (2, 3)]
    assert spans(file, 2**30) == [(0, 3)]
    assert list(read(file, (1, 3), columns=["text"])) == [
        (f"{path}:3", {"text": "c"}),
        (f"{path}:4", {"text": "d"}),
        (f"{path}:5", {"text": "e"}),
    ]


def warc(*records: tuple[str, str, bytes]) -> bytes:
    """Write records of (type, HTTP headers, body), each as its own gzip member as crawlers do."""
    out = b""
    for number, (kind, http, body) in enumerate(records):
        block = (http.encode() + b"\r\n\r\n" if http else b"") + body
        content = "application/http; msgtype=response" if http else "text/plain"
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://x.org/{number}\r\n"
            f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-00000000000{number}>\r\n"
            f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Type: {content}\r\n"
            f"Content-Length: {len(block)}\r\n\r\n"
        )
        out += gzip.compress(head.encode() + block + b"\r\n\r\n", mtime=0)
    return out


def test_common_crawl(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.wet.gz"
    path.write_bytes(warc(("warcinfo", "", b"x"), *(("conversion", "", t.encode()) for t in TEXTS)))
    assert [record for _, record in read(find(path)[0])] == [
        {"text": text, "url": f"http://x.org/{n}"} for n, text in enumerate(TEXTS, start=1)
    ]
    page = "<html><head><script>x()</script></head><body><p>Touch\u00e9 text.</p></body></html>"
    path = tmp_path / "b.warc.gz"
    path.write_bytes(
        warc(
            ("request", "GET / HTTP/1.1", b""),
            (
                "response",
                "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=latin1",
                page.encode("latin1"),
            ),
            ("response", "HTTP/1.1 200 OK\r\nContent-Type: image/png", b"\x89PNG"),
        )
    )
    assert texts_of(path) == ["Touch\u00e9 text."]


# Without a time: a test's name has its bytes, and must be the same in every process of pytest.
PACKED = gzip.compress(lines(TEXTS), mtime=0)
BROKEN: list[tuple[str, bytes, list[str], str]] = [
    ("a.jsonl", lines(TEXTS[:1]) + b'{"text"\n' + lines(TEXTS[1:]), TEXTS, r"a\.jsonl:2: broken"),
    (
        "a.jsonl",
        lines(TEXTS[:1]) + '{"text": "touch\u00e9"}\n'.encode("latin1") + lines(TEXTS[1:]),
        TEXTS,
        r"a\.jsonl:2: invalid UTF-8 at byte 16",
    ),
    ("a.jsonl", b'{"text": "a\0b"}\n' + lines(TEXTS), TEXTS, r"a\.jsonl:1: broken JSON"),
    ("a.txt", b"one\ntwo\0", [], r"a\.txt:2: NUL bytes"),
    ("a.txt", b"one\n\xff", [], r"a\.txt:2: invalid UTF-8 at byte 1 of the line \(0xff\)"),
    ("a.jsonl.gz", PACKED + b"garbage", TEXTS, r"cannot be read to its end"),
    ("a.parquet", b"PAR1", [], r"not a Parquet file"),
    ("a.warc.gz", warc(("conversion", "", b"\xff")), [], r"a\.warc\.gz:1: invalid UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "texts", "message"), BROKEN)
def test_what_is_broken_is_named_and_the_rest_kept(
    tmp_path: Path, name: str, content: bytes, texts: list[str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    file = find(tmp_path / name)[0]
    found, errors = what_is_read(file)
    assert found == texts
    assert len(errors) == 1
    with pytest.raises(RecipeError, match=message):
        list(read(file))


def test_a_truncated_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    texts = [f"{n} {hash((n, 'salt'))}" for n in range(100_000)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(texts))[:-1000])
    found, errors = what_is_read(find(path)[0])
    assert len(found) > 50_000
    assert found == texts[: len(found)]
    assert len(errors) == 1
    assert "ended before the end-of-stream marker" in errors[0]
    path = tmp_path / "a.wet.gz"
    path.write_bytes(warc(*(("conversion", "", t.encode()) for t in TEXTS))[:-30])
    found, errors = what_is_read(find(path)[0])
    assert found[:2] == TEXTS[:2]
    assert len(errors) == 1


def test_a_line_without_end_is_skipped_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MAX_RECORD_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * 3 * 2**20 + b'"}\n'
    path.write_bytes(lines(TEXTS[:1]) + long + lines(TEXTS[1:]))
    for span in (None, (0, path.stat().st_size)):
        errors: list[RecipeError] = []
        records = [r["text"] for _, r in read(find(path)[0], span, on_error=errors.append)]
        assert records == TEXTS
        assert [str(error).partition(": ")[0] for error in errors] == [f"{path}:2"]
    # A span that begins inside the line has nothing of it.
    span = (2**20, path.stat().st_size)
    assert [r["text"] for _, r in read(find(path)[0], span)] == TEXTS[1:]


def test_a_later_span_still_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS) + b"{\n" + lines(TEXTS))
    file = find(path)[0]
    with pytest.raises(RecipeError, match=r"a\.jsonl:4: broken JSON"):
        list(read(file, (20, file.size)))


@pytest.fixture
def bucket() -> Iterator[fs.FileSystem]:
    """A filesystem that is none of the disk's, with the address fsspec+memory://bucket/."""
    system, _ = fs.FileSystem.from_uri("fsspec+memory://bucket")
    system.create_dir("/bucket")
    yield system
    system.delete_dir("/bucket")


def put(system: fs.FileSystem, path: str, content: bytes) -> None:
    with system.open_output_stream(f"/bucket/{path}", compression=None) as stream:
        stream.write(content)


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_a_bucket_is_read_like_the_disk(
    bucket: fs.FileSystem, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    put(bucket, f"web/1.jsonl{ending}", pack(lines(TEXTS)))
    put(bucket, f"web/2.jsonl{ending}", pack(lines(TEXTS[:1])))
    for address in ("fsspec+memory://bucket/web", "fsspec+memory://bucket/*/?.jsonl*"):
        assert texts_of(address) == [*TEXTS, *TEXTS[:1]]
    table = pa.table({"text": TEXTS})
    with bucket.open_output_stream("/bucket/a.parquet") as stream:
        pq.write_table(table, stream)
    assert texts_of("fsspec+memory://bucket/a.parquet") == TEXTS


def test_pieces_of_a_file_in_a_bucket(bucket: fs.FileSystem) -> None:
    content = lines(TEXTS * 9) + b"{\n" + lines(TEXTS)
    put(bucket, "a.jsonl", content)
    (file,) = find("fsspec+memory://bucket/a.jsonl")
    assert file.size == len(content)
    found: list[str] = []
    errors: list[RecipeError] = []
    for span in spans(file, 100):
        found += [record["text"] for _, record in read(file, span, on_error=errors.append)]
    assert found == TEXTS * 10
    assert [str(error).partition(": ")[0] for error in errors] == [f"{file}:{9 * len(TEXTS) + 1}"]


@pytest.mark.parametrize(
    ("address", "opened", "inner"),
    [
        ("s3://b/x/*.jsonl", "s3://b", "b/x/*.jsonl"),
        (
            "s3://b/x?endpoint_override=h:9000&scheme=http",
            "s3://b?endpoint_override=h:9000&scheme=http",
            "b/x",
        ),
        ("s3://b/x/?.jsonl", "s3://b", "b/x/?.jsonl"),
        ("gs://anonymous@b/x.jsonl", "gs://anonymous@b", "b/x.jsonl"),
        (
            "hf://datasets/allenai/c4/en/*.json.gz",
            "hf://datasets",
            "datasets/allenai/c4/en/*.json.gz",
        ),
    ],
)
def test_addresses_keep_user_and_options(
    monkeypatch: pytest.MonkeyPatch, address: str, opened: str, inner: str
) -> None:
    asked: list[str] = []

    def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
        asked.append(uri)
        return fs.LocalFileSystem(), uri.partition("?")[0].partition("://")[2].rpartition("@")[2]

    monkeypatch.setattr(storage, "_filesystem", from_uri)
    place = storage._locate(address)
    assert (asked, place.path) == ([opened], inner)
    # A file that is found there is opened with the same user and options.
    again = storage._locate(place.uri("b/found.jsonl.gz"))
    assert asked[1] == opened if not address.startswith("hf") else "hf://b"
    assert again.path == "b/found.jsonl.gz"
    assert InputFile(place.uri("b/found.jsonl.gz"), 1, 0).compression == "gzip"
    assert InputFile(place.uri("b/found.jsonl.gz"), 1, 0).format == "jsonl"


def test_files_of_unknown_endings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jsonl", "b.jsonl.xz", "c.html", ".hidden", "_SUCCESS"):
        (tmp_path / name).write_bytes(lines(TEXTS))
    assert [Path(file.path).name for file in find(tmp_path)] == ["a.jsonl"]
    assert "2 of 5 files are left out" in (said := capsys.readouterr().err)
    assert ".html, .jsonl.xz" in said
    find(tmp_path)
    assert not capsys.readouterr().err  # once is enough


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_json_that_python_cannot_hold(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": {value}\n', encoding="utf-8")
    with path.open("ab") as file:
        file.write(lines(TEXTS))
    found, errors = what_is_read(find(path)[0])
    assert found == TEXTS
    assert [error.partition(": ")[0] for error in errors] == [f"{path}:1"]


def test_the_longest_line_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_RECORD_BYTES", 40)
    path = tmp_path / "a.jsonl"
    for length, expected in ((40, 2), (41, 1)):
        for end in (b"\n", b"\r\n"):
            line = b'{"text": "' + b"x" * (length - 12) + b'"}'
            assert len(line) == length
            path.write_bytes(line + end + lines(["next"]))
            found, errors = what_is_read(find(path)[0])
            assert (len(found), len(errors)) == (expected, 2 - expected)
            assert found[-1] == "next"


def test_a_page_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_RECORD_BYTES", 10_000)
    path = tmp_path / "a.wet.gz"
    path.write_bytes(warc(("conversion", "", b"x" * 20_000), ("conversion", "", b"short")))
    found, errors = what_is_read(find(path)[0])
    assert found == ["short"]
    assert [error.partition(": ")[0] for error in errors] == [f"{path}:1"]


def test_a_parquet_file_of_another_schema_and_one_that_vanished(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), path)
    file = find(path)[0]
    with pytest.raises(RecipeError, match=r"a\.parquet: no column text, only content, id"):
        list(read(file, columns=["text"]))
    path.unlink()
    with pytest.raises(RecipeError, match=r"a\.parquet: vanished since it was listed"):
        list(read(file))


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad = pa.array([b"one", b"\xff", b"two"]).cast(pa.binary())
    pq.write_table(pa.table({"text": bad.view(pa.string())}), path)
    found, errors = what_is_read(find(path)[0])
    assert found == ["one", "two"]
    assert [error.partition(": ")[0] for error in errors] == [f"{path}:2"]


def test_a_fingerprint_follows_content_and_not_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    first = storage.fingerprint(path)
    os.utime(path, (1, 1))
    assert storage.fingerprint(path) == first
    path.write_bytes(lines(TEXTS[::-1]))
    assert storage.fingerprint(path) != first
    # Large files are known by size and time alone.
    monkeypatch.setattr(storage, "BYTES_HASHED", 10)
    first = storage.fingerprint(path)
    os.utime(path, (1, 1))
    assert storage.fingerprint(path) != first
