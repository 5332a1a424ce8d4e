"""What the doctor found: one line each, with the fix below what is not ok."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
NUM_NAMED = 8
"""Nodes that a line names."""


@dataclass(frozen=True)
class Finding:
    """The result of a check, on some nodes or on all."""

    status: Status
    check: str
    value: str
    fix: str = ""
    """What to do, in one line; empty where all is well."""
    nodes: tuple[str, ...] = ()
    """Names of the nodes; empty for what is not of a node."""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.status != "ok"), self

    def record(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "status": self.status,
            "check": self.check,
            "nodes": list(self.nodes),
            "value": self.value,
            "fix": self.fix,
        }


def ok(check: str, value: str, *nodes: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding("ok", check, value, nodes=nodes)


def warn(check: str, value: str, fix: str, *nodes: str) -> Finding:
    """Return a finding with which a run goes on, slower or with a risk."""
    return Finding("warn", check, value, fix, nodes)


def fail(check: str, value: str, fix: str, *nodes: str) -> Finding:
    """Return a finding that stops a run or makes its result wrong."""
    return Finding("fail", check, value, fix, nodes)


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Join findings that differ in their node only, in the order of the first of each."""
    same: dict[tuple[str, ...], list[str]] = {}
    for each in findings:
        key = (each.status, each.check, each.value, each.fix)
        same.setdefault(key, []).extend(each.nodes)
    return [
        Finding(status, check, value, fix, tuple(nodes))  # type: ignore[arg-type]
        for (status, check, value, fix), nodes in same.items()
    ]


def line(finding: Finding, num_nodes: int) -> str:
    """Return what is shown of a finding, on a cluster of so many nodes."""
    nodes = finding.nodes
    if not nodes or num_nodes == 1:
        where = ""
    elif len(nodes) == num_nodes:
        where = f"all {num_nodes} nodes: "
    else:
        where = f"{first_names(nodes)}: "
    text = f"{finding.status:<4}  {finding.check:<10}  {where}{finding.value}"
    return text + (f"\n{'':18}fix: {finding.fix}" if finding.fix else "")


def first_names(nodes: Sequence[str]) -> str:
    """Return the names of the first nodes, and how many more there are."""
    more = f" and {len(nodes) - NUM_NAMED} more" if len(nodes) > NUM_NAMED else ""
    return ", ".join(nodes[:NUM_NAMED]) + more


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings of each status there are."""
    statuses = [each.status for each in findings]
    return {status: statuses.count(status) for status in ("ok", "warn", "fail")}
