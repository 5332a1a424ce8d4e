"""Every kind of bad record is a RecipeError with file, line and fix."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrlhf.config import RecipeError
from rayrlhf.data.records import Kind, check, read_records

GOOD: dict[Kind, dict[str, Any]] = {
    "document": {"text": "a"},
    "demonstration": {"prompt": "a", "response": "b"},
    "comparison": {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]},
    "prompt": {"prompt": "a"},
}
ASK: dict[str, str] = {"role": "user", "content": "a"}
SAY: dict[str, str] = {"role": "assistant", "content": "b"}
K = "K must be from 2 to 9"
BAD: list[tuple[Kind, dict[str, Any], str]] = [
    ("document", {"txt": "a"}, "no field text, only txt"),
    ("document", {"text": 3}, "text=3 is int, not a string"),
    ("demonstration", {"prompt": "a"}, "no field response"),
    ("demonstration", {"prompt": "", "response": "b"}, "prompt is empty"),
    ("demonstration", {"response": "b"}, r"no field prompt \(or messages\)"),
    ("demonstration", {"messages": [{"role": "user", "content": "a"}]}, "must be from assistant"),
    ("comparison", {"prompt": "a", "responses": ["b"], "ranks": [1]}, K),
    ("comparison", {"prompt": "a", "responses": ["b"] * 10, "ranks": [1] * 10}, K),
    ("comparison", {"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "1 ranks for 2"),
    ("comparison", {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]}, "ranks="),
    ("comparison", {"prompt": "a", "responses": ["b", "c"], "ranks": [True, 2]}, "ranks="),
    ("comparison", {"prompt": "a", "responses": ["b", 2], "ranks": [1, 2]}, "responses="),
    ("comparison", {"prompt": "a", "responses": ["b", "c"]}, "no field ranks"),
    ("comparison", {"prompt": "a", "chosen": "b"}, "no field rejected"),
    ("comparison", {"responses": ["b", "c"], "ranks": [1, 2]}, r"no field prompt \(or messages\)"),
    ("comparison", {"messages": [ASK, SAY], "responses": ["b", "c"]}, "must be from user"),
    ("comparison", {"chosen": [ASK, SAY], "rejected": [SAY]}, "must answer the same chat"),
    ("comparison", {"chosen": [ASK, SAY], "rejected": [ASK]}, "rejected: the last message is from"),
    ("comparison", {"chosen": [ASK, SAY], "rejected": "b"}, "is list, not a string"),
    ("comparison", {"chosen": [SAY], "rejected": [SAY]}, "messages="),
    ("prompt", {"prompt": ""}, "prompt is empty"),
    ("prompt", {"messages": []}, "messages="),
    ("prompt", {"messages": [{"role": "robot", "content": "a"}]}, "robot"),
    ("prompt", {"messages": [{"role": "assistant", "content": "a"}]}, "must be from user"),
]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", GOOD)
def test_extra_columns_are_kept(tmp_path: Path, kind: Kind) -> None:
    record = {**GOOD[kind], "source": "x"}
    assert read_records(write(tmp_path / "a.jsonl", record, record), kind) == [record, record]


@pytest.mark.parametrize(("kind", "record", "message"), BAD)
def test_bad_record_names_file_and_line(
    tmp_path: Path, kind: Kind, record: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", GOOD[kind], record)
    with pytest.raises(RecipeError, match=message) as caught:
        read_records(path, kind)
    assert str(caught.value).startswith(f"{path}:2: ")


OTHER = {"role": "assistant", "content": "c"}
TURNS = [ASK, SAY, ASK]


@pytest.mark.parametrize(
    ("record", "messages", "prompt"),
    [
        ({"chosen": [ASK, SAY], "rejected": [ASK, OTHER]}, [ASK], "a"),
        ({"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]}, [ASK], "a"),
        ({"prompt": "said", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]}, [ASK], "said"),
        ({"prompt": [ASK], "chosen": [ASK, SAY], "rejected": [ASK, OTHER]}, [ASK], "a"),
        ({"prompt": "a", "messages": [ASK, SAY], "chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
         [ASK], "a"),
        ({"messages": TURNS, "chosen": [SAY], "rejected": [OTHER]}, TURNS,
         "user: a\n\nassistant: b\n\nuser: a"),
        ({"messages": TURNS, "chosen": "b", "rejected": "c"}, TURNS,
         "user: a\n\nassistant: b\n\nuser: a"),
        ({"messages": [ASK], "responses": ["b", "c"], "ranks": [1, 2]}, [ASK], "a"),
    ],
)  # fmt: skip
def test_comparisons_of_chats(record: dict[str, Any], messages: Any, prompt: str) -> None:
    """In the forms that public preference data has, explicit and implicit."""
    found = check("x", record, "comparison")
    assert found == {
        "prompt": prompt, "messages": messages, "responses": ["b", "c"], "ranks": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize("beside", [None, [ASK, SAY]])
def test_messages_beside_a_text_are_no_prompt(beside: Any) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "messages": beside}
    wanted = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}
    assert check("x", pair, "comparison") == wanted


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "broken JSON at column"),
        (b'{"text": "\xe9t\xe9"}', "invalid UTF-8 at byte 11 .*0xe9.*save the file as UTF-8"),
        (b'["a"]', "list instead of a JSON object"),
        (b'{"text": "\\ud83d"}', "half of a character"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(RecipeError, match=message) as caught:
        read_records(path, "document")
    assert str(caught.value).startswith(f"{path}:3: ")


def test_whole_surrogate_pairs_marks_and_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\\ud83d\\ude00"}\r\n{"text": "b"}')
    assert read_records(path, "document") == [{"text": "\U0001f600"}, {"text": "b"}]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"a\.jsonl: empty file"):
        read_records(path, "prompt")


def test_missing_file_and_folder_without_records(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        read_records(tmp_path / "a.jsonl", "prompt")
    with pytest.raises(RecipeError, match="no such file"):
        read_records(tmp_path / "*.jsonl", "prompt")
    with pytest.raises(RecipeError, match=r"no \.jsonl, .* file in this folder"):
        read_records(tmp_path, "prompt")


def test_folder_and_glob_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "2"})
    write(tmp_path / "a.jsonl", {"text": "1"})
    expected = [{"text": "1"}, {"text": "2"}]
    assert read_records(tmp_path, "document") == expected
    assert read_records(tmp_path / "*.jsonl", "document") == expected


def test_chosen_and_rejected_are_two_ranked_responses(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r", "x": 1})
    assert read_records(path, "comparison") == [
        {"prompt": "p", "x": 1, "responses": ["c", "r"], "ranks": [1, 2]}
    ]


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD["comparison"], GOOD["comparison"]]), path)
    assert read_records(path, "comparison") == [GOOD["comparison"]] * 2
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(RecipeError, match=r"a\.parquet:2: .*no field text"):
        read_records(path, "document")
    path.write_text("{}")
    with pytest.raises(RecipeError, match="not a Parquet file"):
        read_records(path, "document")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratings", [1.0]),
        ("ratings", [1.0, "2"]),
        ("ratings", [1.0, float("nan")]),
        ("single_ratings", [[1, 2]]),
        ("single_ratings", [[1, 2], []]),
        ("single_ratings", [[1, 2], [True]]),
        ("single_ratings", [1, 2]),
    ],
)
def test_ratings_that_do_not_fit_the_responses(field: str, value: Any) -> None:
    good = {"prompt": "A", "responses": [" a", " b"], "ranks": [1, 2]}
    fine = {**good, "ratings": [2, 1.5], "single_ratings": [[1, 3], [1.5]]}
    assert check("x:1", fine, "comparison") == fine
    assert check("x:1", {**good, field: None}, "comparison")
    with pytest.raises(RecipeError, match=rf"x:1: {field}=.* of the 2 responses"):
        check("x:1", {**good, field: value}, "comparison")
