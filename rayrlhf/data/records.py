"""Records of data files: read, checked one by one, errors with file and line.

Kinds: `document` (text), `demonstration` (prompt + response, or messages), `comparison` (prompt or
messages, responses, ranks; or chosen / rejected, as texts or as whole chats), `item` (a comparison
that nobody ranked yet: its ranks, if any, are not read) and `prompt` (prompt, or messages). Where a
comparison has messages, models read these, and people its `prompt`. Extra columns are kept.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rayrlhf.config import RecipeError
from rayrlhf.data import inputs, storage
from rayrlhf.data.inputs import Record

__all__ = [
    "Kind",
    "Record",
    "check",
    "check_exactly",
    "identity",
    "iter_records",
    "joined",
    "prompt_text",
    "read_records",
]
Kind = Literal["document", "demonstration", "comparison", "item", "prompt"]
MIN_RESPONSES, MAX_RESPONSES = 2, 9
_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_records(path: str | Path, kind: Kind) -> list[Record]:
    """Return every record of `path`, checked and in one form.

    `path` is a `builtin:` name, or a file, a folder or a glob, local or a URI (inputs.py). A
    `chosen` / `rejected` pair comes back as `responses` and `ranks`. Raises RecipeError with file
    and line of the first bad record.
    """
    return list(iter_records(path, kind))


def iter_records(path: str | Path, kind: Kind) -> Iterator[Record]:
    """Yield what `read_records` returns, holding one line (or one row group) at a time."""
    for file in storage.find(path):
        empty = True
        for where, record in inputs.read(file):
            empty = False
            yield check(where, record, kind)
        if empty:
            raise empty_file(file, kind)


def check(where: str, record: Record, kind: Kind) -> Record:
    """Return the record in its one form; raises RecipeError that begins with `where`."""
    return _CHECKS[kind](where, record)


def check_exactly(file: storage.InputFile, where: str, record: Record, kind: Kind) -> Record:
    """Do as `check`; an error names the line, where `where` only has the byte of a later piece."""
    try:
        return check(where, record, kind)
    except RecipeError:
        # Counting lines takes time, so only for what goes wrong.
        return check(inputs.exact_place(file, where), record, kind)


def empty_file(file: storage.InputFile, kind: Kind) -> RecipeError:
    """Return the error about a file without records."""
    return RecipeError(
        f"{file}: empty file, but at least one {kind} record is needed: "
        "write records to it or take it out of the recipe"
    )


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
    if "responses" not in record and ("chosen" in record or "rejected" in record):
        return _check_pair(where, record)
    record = _check_opening(where, record)
    responses = _responses(where, record, instead="chosen and rejected")
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
    _check_ratings(where, record, len(responses))
    return record


def _check_pair(where: str, record: Record) -> Record:
    """Return a comparison of what was chosen and what was rejected."""
    pair = [_field(where, record, name) for name in ("chosen", "rejected")]
    rest = {k: v for k, v in record.items() if k not in ("chosen", "rejected")}
    if all(isinstance(each, list) for each in pair):
        rest, pair = _split_chats(where, rest, *pair)
    for name, text in zip(("chosen", "rejected"), pair, strict=True):
        _text(where, {name: text}, name)
    return {**_check_opening(where, rest), "responses": pair, "ranks": [1, 2]}


def _split_chats(
    where: str, record: Record, chosen: list[Any], rejected: list[Any]
) -> tuple[Record, list[Any]]:
    """Return the record with the messages before two answers, and the answers.

    The chats begin with what comes before, or `messages` or `prompt` has it where they are only the
    answers. Beside whole chats, some data has more columns with these names.
    """
    _messages(f"{where}: chosen", {"messages": chosen}, last="assistant")
    _messages(f"{where}: rejected", {"messages": rejected}, last="assistant")
    if chosen[:-1] != rejected[:-1]:
        raise RecipeError(
            f"{where}: chosen and rejected differ before their last message, but they must answer "
            "the same chat: correct or remove the record"
        )
    before = record.get("messages") or record.get("prompt")
    opening = chosen[:-1] or (before if isinstance(before, list) else [])
    rest = {k: v for k, v in record.items() if k != "prompt" or isinstance(v, str)}
    return {**rest, "messages": opening}, [chosen[-1]["content"], rejected[-1]["content"]]


def _check_item(where: str, record: Record) -> Record:
    record = _check_opening(where, record)
    _responses(where, record)
    return record


def _check_opening(where: str, record: Record) -> Record:
    """Return a comparison or an item with the text that people read before the responses."""
    if "messages" in record and _is_beside(record):
        record = {name: value for name, value in record.items() if name != "messages"}
    record = _check_prompt(where, record)
    if "messages" in record:
        record = {"prompt": prompt_text(record), **record}
        _text(where, record, "prompt")
    return record


def _is_beside(record: Record) -> bool:
    """Tell whether `messages` is no prompt: nothing, or a whole chat beside a text."""
    messages = record["messages"]
    if messages is None:
        return True
    is_whole = isinstance(messages, list) and bool(messages) and isinstance(messages[-1], dict)
    return (
        is_whole
        and messages[-1].get("role") == "assistant"
        and isinstance(record.get("prompt"), str)
    )


def identity(record: Record) -> str:
    """Return what tells the prompt of a comparison from others: what models read of it."""
    if "messages" in record:
        return json.dumps(record["messages"], sort_keys=True)
    return str(record["prompt"])


def prompt_text(record: Record) -> str:
    """Return a prompt as people and judges read it: its text, or the turns of a chat."""
    if "messages" not in record:
        return str(record["prompt"])
    messages = record["messages"]
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in messages)


def joined(prompt: str, response: str, *, is_chat: bool) -> str:
    """Return prompt and response as the one text that they are for people.

    A response goes on where a text ends; an answer in a chat is a text of its own.
    """
    return f"{prompt}\n\n{response}" if is_chat else prompt + response


def _said(message: dict[str, Any]) -> str:
    """Return what a turn says; the calls of one that only calls tools."""
    content = message.get("content")
    return json.dumps(message["tool_calls"]) if content is None else str(content)


def _responses(where: str, record: Record, *, instead: str = "") -> list[str]:
    responses = _field(where, record, "responses", instead=instead)
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
    return responses


def _check_ratings(where: str, record: Record, num_responses: int) -> None:
    """Check the means and the single ratings of a comparison, where it has them."""
    ratings, single = record.get("ratings"), record.get("single_ratings")
    if ratings is not None and not _are_numbers(ratings, num_responses):
        raise RecipeError(
            f"{where}: ratings={_short(ratings)} must be one number for each of the "
            f"{num_responses} responses: correct or remove the field"
        )
    if single is not None and not (
        isinstance(single, list)
        and len(single) == num_responses
        and all(isinstance(one, list) and one and _are_numbers(one, len(one)) for one in single)
    ):
        raise RecipeError(
            f"{where}: single_ratings={_short(single)} must be, for each of the {num_responses} "
            "responses, a list with the number that each person gave: correct or remove the field"
        )


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    )


_CHECKS: dict[Kind, Callable[[str, Record], Record]] = {
    "document": _check_document,
    "demonstration": _check_demonstration,
    "comparison": _check_comparison,
    "item": _check_item,
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
    roles = " | ".join(f'"{role}"' for role in _ROLES)
    rule = f'a list of {{"role": {roles}, "content": "..."}}'
    if not isinstance(messages, list) or not messages:
        raise RecipeError(f"{where}: messages={_short(messages)} must be {rule}: correct it")
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in _ROLES
            or not isinstance(message.get("content"), str)
            and not _calls_only(message)
        ):
            raise RecipeError(
                f"{where}: the message {_short(message)} does not fit {rule}: correct it"
            )
    if messages[-1]["role"] != last:
        raise RecipeError(
            f"{where}: the last message is from {messages[-1]['role']}, but it must "
            f"be from {last}: add or remove a message"
        )


def _calls_only(message: dict[str, Any]) -> bool:
    """Tell whether an answer calls tools and says nothing else."""
    calls = message["role"] == "assistant" and bool(message.get("tool_calls"))
    return calls and message.get("content") is None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
