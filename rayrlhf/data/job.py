"""A list of tasks as a Ray Data job: what every step over files has in common."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from rayrlhf import console

Task = Callable[[str, Any, Any], Any]
_LINE_EVERY_S = 30


def run_tasks(
    what: str,
    task: Task,
    items: Sequence[str],
    rules: Any,
    shared: Any,
    each: Callable[[Any], None] = lambda result: None,
) -> list[Any]:
    """Execute task(item, rules, shared) for every item on the cluster, in any order.

    `shared` is sent to each node once. Returns what the tasks return (JSON), in the order of
    `items`, and shows it to `each` when it comes; a line every 30 s says how far the job is.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    reference = ray.put(shared)

    def batch(rows: Mapping[str, Any]) -> dict[str, list[str]]:
        results = [
            json.dumps([int(number), task(item, rules, ray.get(reference))])
            for number, item in zip(rows["number"], rows["item"], strict=True)
        ]
        return {"result": results}

    # Many small items share a task, which costs more than to tokenize a megabyte.
    cpus = int(ray.cluster_resources().get("CPU", 1))
    rows = [{"number": number, "item": item} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 32 * cpus)).map_batches(
        batch, batch_size=None, batch_format="numpy"
    )
    found: dict[int, Any] = {}
    next_line = time.monotonic() + _LINE_EVERY_S
    for row in dataset.iter_rows():
        number, result = json.loads(row["result"])
        found[number] = result
        each(result)
        if time.monotonic() > next_line:
            console.say(f"{what}: {len(found)} of {len(items)} tasks done")
            next_line = time.monotonic() + _LINE_EVERY_S
    return [found[number] for number in range(len(items))]
