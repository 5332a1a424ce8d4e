"""The tasks of a job one after the other in this process, in place of a cluster."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayrlhf.data.job import Account, Step


def inline(step: Step, items: Mapping[str, Any]) -> Iterator[tuple[str, Account]]:
    """Do what `job.on_cluster` does; items and accounts go through JSON as they do there."""
    for name, item in items.items():
        account = step.do(name, json.loads(json.dumps(item)), step.shared)
        yield name, json.loads(json.dumps(account))
