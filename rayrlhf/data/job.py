"""A list of tasks as a Ray Data job: what every step over files has in common.

    items --those without an account--> tasks on the cluster --account, written last--> accounts

A task writes files of its own and returns an account of them (JSON), which is stored when all else
is on disk: a task that has an account is finished, and is not done again by a job that goes on.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from rayrlhf import console
from rayrlhf.data.storage import replacing

Account = dict[str, Any]
Task = Callable[[Any, Any, Any], Account]
"""task(item, rules, shared) -> account; one with `failed` is not stored."""
_LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class Step:
    """One task, to be done for many items."""

    what: str
    """Begins the lines that say how far the step is, and its errors."""
    task: Task
    rules: Any
    shared: Any
    """Larger than `rules`: sent to each node once."""
    accounts: Path
    """Folder of the accounts, one per item."""

    def run(
        self, items: Mapping[str, Any], each: Callable[[Account], None] = lambda account: None
    ) -> list[Account]:
        """Do the task on the cluster for every named item (JSON) that has no account yet.

        Returns the accounts in the order of `items`, each shown to `each` as soon as it is there;
        a line every 30 s says how far the step is.
        """
        self.accounts.mkdir(parents=True, exist_ok=True)
        stored = {file.stem for file in self.accounts.glob("*.json")}
        found = {name: self._load(name) for name in items if name in stored}
        for account in found.values():
            each(account)
        missing = {name: item for name, item in items.items() if name not in found}
        with _lines(lambda: f"{self.what}: {len(found)} of {len(items)} tasks done"):
            for name, account in on_cluster(self, missing) if missing else ():
                found[name] = account
                each(account)
        return [found[name] for name in items]

    def do(self, name: str, item: Any, shared: Any) -> Account:
        """Do the task for one item and store its account; an error says which item it was."""
        try:
            account = self.task(item, self.rules, shared)
        except Exception as error:
            raise RuntimeError(f"{self.what}: {type(error).__name__} in {item}: {error}") from error
        if not account.get("failed"):
            with replacing(self.accounts / f"{name}.json") as new:
                new.write_text(json.dumps(account), encoding="utf-8")
        return account

    def _load(self, name: str) -> Account:
        account: Account = json.loads((self.accounts / f"{name}.json").read_text("utf-8"))
        return account


def on_cluster(step: Step, items: Mapping[str, Any]) -> Iterator[tuple[str, Account]]:
    """Yield (name, account) of every item as its task ends."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    shared = ray.put(step.shared)
    alone = replace(step, shared=None)

    def batch(rows: Mapping[str, Any]) -> dict[str, list[str]]:
        given = ray.get(shared)
        done = [
            (name, alone.do(name, json.loads(item), given))
            for name, item in zip(rows["name"], rows["item"], strict=True)
        ]
        return {"result": [json.dumps(pair) for pair in done]}

    # Many small items share a task of Ray, which costs more than to tokenize a megabyte.
    cpus = int(ray.cluster_resources().get("CPU", 1))
    rows = [{"name": name, "item": json.dumps(item)} for name, item in items.items()]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 32 * cpus)).map_batches(
        batch, batch_size=None, batch_format="numpy"
    )
    for row in dataset.iter_rows():
        name, account = json.loads(row["result"])
        yield name, account


@contextmanager
def _lines(text: Callable[[], str]) -> Iterator[None]:
    """Print a line every so often while the block runs, whether or not a task ends."""
    stop = threading.Event()

    def watch() -> None:
        next_line = time.monotonic() + _LINE_EVERY_S
        while not stop.wait(max(0.0, next_line - time.monotonic())):
            console.say(text())
            next_line += _LINE_EVERY_S

    thread = threading.Thread(target=watch, name="lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
