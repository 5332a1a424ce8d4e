"""`ppo.profile`: a trace of the trained roles, and where the seconds of a step go.

The first step of a run warms up; the next is traced (`profile/<role>-<rank>.json.gz`, for
chrome://tracing or Perfetto), and what follows is measured: `profile/table.txt` and `table.json`
have the seconds and the FLOP utilisation of every phase of every role, and what a step spends
outside of all of them. FLOPs are those of the model (training/flops.py), without padding,
recomputation and the pretraining mix; the rate that they are held against is that of plain matmuls
with the worker's own threads.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf import console
from rayrlhf.rl.clock import Span
from rayrlhf.rl.groups import TrainedGroup
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.waiting import wait_all

WARM_UP, TRACED, MEASURED = 1, 1, 3
"""Steps of each part."""
HEADER = ("role", "phase", "s per step", "share", "TFLOP per step", "utilisation")


@dataclass(frozen=True)
class Phase:
    """What one phase of one role took per step."""

    role: str
    name: str
    seconds: float
    """From the first rank's start to the last one's end."""
    share: float
    """Of the step."""
    tflop: float
    """Of all ranks."""
    utilization: float
    """FLOPs per second over what the ranks' matmuls reach."""


class Profile:
    """Measures the first steps of a run; with `folder` None, nothing."""

    def __init__(self, roles: Roles, folder: Path | None, num_steps: int) -> None:
        """`num_steps` is how many steps the run has: fewer are measured when it is short."""
        self._groups = {role: group for role, group in vars(roles).items() if group is not None}
        self._folder = folder
        self._left = min(num_steps, WARM_UP + TRACED + MEASURED)
        self._num_steps = 0
        self._rates: dict[str, float] = {}
        self._started = 0.0

    def step_done(self) -> None:
        """Take note that a step has ended; after the last one that counts, write the table."""
        if self._folder is None or self._left == 0:
            return
        self._num_steps += 1
        self._left -= 1
        trained = [g for g in self._groups.values() if isinstance(g, TrainedGroup)]
        if self._num_steps == WARM_UP:
            for group in self._groups.values():  # one after the other: each has all its cores
                self._rates[group.role] = group.matmul_rate().wait()
            wait_all(*[group.start_trace() for group in trained])
        elif self._num_steps == WARM_UP + TRACED:
            self._folder.mkdir(parents=True, exist_ok=True)
            wait_all(*[group.stop_trace(str(self._folder / group.role)) for group in trained])
        if self._num_steps == WARM_UP + TRACED:
            self._read()
            self._started = time.time()
        elif self._left == 0 and self._num_steps > WARM_UP + TRACED:
            self._write(self._read(), time.time() - self._started)

    def _read(self) -> dict[str, list[list[Span]]]:
        """Return the spans of each rank of each role since the last reading."""
        return {role: group.read_clock().wait() for role, group in self._groups.items()}

    def _write(self, spans: Mapping[str, list[list[Span]]], seconds: float) -> None:
        assert self._folder is not None
        count = self._num_steps - WARM_UP - TRACED
        phases = summarize(spans, self._rates, seconds, count)
        every = [span for ranks in spans.values() for rank in ranks for span in rank]
        idle = 1 - covered(every) / seconds
        rows: list[tuple[Any, ...]] = [
            (each.role, each.name, each.seconds, each.share, each.tflop, each.utilization)
            for each in phases
        ]
        rows.append(("controller", "nobody works", idle * seconds / count, idle, None, None))
        text = console.table(HEADER, rows)
        (self._folder / "table.txt").write_text(text + "\n", encoding="utf-8")
        found = {
            "step_s": seconds / count,
            "idle_share": idle,
            "phases": [vars(each) for each in phases],
            "text": text,
        }
        (self._folder / "table.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        console.say(f"ppo: profile of {count} steps, traces beside it, in {self._folder}\n{text}")


def summarize(
    spans: Mapping[str, list[list[Span]]],
    rates: Mapping[str, float],
    seconds: float,
    num_steps: int,
) -> list[Phase]:
    """Return what each phase of each role took; `rates` are FLOP/s of all ranks of a role."""
    phases = []
    for role, ranks in spans.items():
        for name in dict.fromkeys(span.phase for rank in ranks for span in rank):
            mine = [span for rank in ranks for span in rank if span.phase == name]
            busy, flops = covered(mine), sum(span.flops for span in mine)
            phases.append(
                Phase(
                    role=role,
                    name=name,
                    seconds=busy / num_steps,
                    share=busy / seconds,
                    tflop=flops / num_steps / 1e12,
                    utilization=flops / (busy * rates[role]) if busy else 0.0,
                )
            )
    return phases


def covered(spans: Iterable[Span]) -> float:
    """Return the seconds in which at least one of the spans runs."""
    total = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total
