"""The loop on several ranks without Ray: processes over gloo, each of which does a list of runs."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayrlhf.config import Recipe
from rayrlhf.training import loop
from rayrlhf.training.stage import Stage


@dataclass(frozen=True)
class Run:
    """All models of a stage from the beginning to the end, or killed on the way and begun again."""

    recipe: Recipe
    kind: type[Stage]
    killed_after: int | None = None


class Killed(Exception):
    """Stands for SIGKILL, on all ranks at once."""


def run_on_ranks(runs: Sequence[Run], world_size: int, folder: Path) -> None:
    """Do the runs one after the other on `world_size` ranks; `folder` is where they meet.

    One rank is this process.
    """
    for run in runs:
        shutil.rmtree(run.recipe.path / run.kind.name, ignore_errors=True)
    if world_size == 1:
        _do(runs)
        return
    mp.spawn(_rank, (world_size, str(folder / "meeting"), runs), nprocs=world_size)


def _rank(rank: int, world_size: int, meeting: str, runs: Sequence[Run]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    _do(runs)
    dist.destroy_process_group()


def _do(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.killed_after is not None:
            _run_and_die(run, run.killed_after)
        for stage in run.kind.runs(run.recipe):
            loop.run(stage, torch.device("cpu"))


def _run_and_die(run: Run, killed_after: int) -> None:
    step_of_loop = loop.train_step

    def dies(stage: Stage, backend: Any, step: int, micros: Any) -> dict[str, float]:
        if step > killed_after:
            raise Killed
        return step_of_loop(stage, backend, step, micros)

    loop.train_step = dies
    try:
        loop.run(run.kind(run.recipe), torch.device("cpu"))
    except Killed:
        return
    finally:
        loop.train_step = step_of_loop
    raise AssertionError("it ended before it was killed")
