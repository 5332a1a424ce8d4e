"""Steps of a job: every item once, finished ones never again, errors and waits with a name."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.data import job
from rayrlhf.data.job import Account, Step
from tests.data.inline import inline


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "on_cluster", inline)


def square(item: int, rules: int, shared: int) -> Account:
    if item == 13:
        raise ZeroDivisionError("bad luck")
    return {"square": item * item + rules + shared, "failed": item == 7}


def step(folder: Path) -> Step:
    return Step("squares", square, 100, 1000, folder / "accounts")


def test_every_item_once_in_order(tmp_path: Path) -> None:
    seen: list[int] = []
    accounts = step(tmp_path).run(
        {"b": 2, "a": 1, "c": 7}, each=lambda account: seen.append(account["square"])
    )
    assert [account["square"] for account in accounts] == [1104, 1101, 1149] == seen
    # What failed has no account: it is done again.
    assert sorted(file.name for file in (tmp_path / "accounts").iterdir()) == ["a.json", "b.json"]


def test_a_finished_item_is_not_done_again(tmp_path: Path) -> None:
    step(tmp_path).run({"a": 1})
    (tmp_path / "accounts/a.json").write_text(json.dumps({"square": "from before"}))
    seen: list[Any] = []
    found = step(tmp_path).run({"a": 1, "b": 2}, each=lambda account: seen.append(account))
    assert [account["square"] for account in found] == ["from before", 1104]
    assert seen == found


def test_an_error_names_the_item(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="squares: ZeroDivisionError in 13: bad luck"):
        step(tmp_path).run({"a": 1, "b": 13})
    assert (tmp_path / "accounts/a.json").exists()


def test_a_long_step_prints_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(step: Step, items: Mapping[str, Any]) -> Iterator[tuple[str, Account]]:
        yield from inline(step, {"a": 1})
        time.sleep(0.3)
        yield from inline(step, {"b": 2})

    monkeypatch.setattr(job, "on_cluster", slow)
    monkeypatch.setattr(job, "_LINE_EVERY_S", 0.1)
    step(tmp_path).run({"a": 1, "b": 2})
    assert "squares: 1 of 2 tasks done" in capsys.readouterr().out
