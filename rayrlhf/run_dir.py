"""The run directory: where it may lie, and the one command that may write to it."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrlhf import console
from rayrlhf.config import Recipe, RecipeError

# Ray sets it for the driver of a submitted job alone; nothing else tells one from another driver.
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_UNPACKED = "working_dir_files"
"""Folder of a node's session that holds the unpacked working directories of jobs."""
_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class PeopleNeeded(Exception):
    """The run goes on when people have done their part; the text says what it is, and how."""


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe with a run directory that outlives the command.

    The working directory of a submitted job is a copy on one node that Ray deletes, so a relative
    `run_dir` there lies in the home directory instead. Raises RecipeError for one in that copy.
    """
    if _IN_JOB not in os.environ:
        return recipe
    if not recipe.path.is_absolute():
        place = Path.home() / recipe.path
        console.warn(
            f"run_dir={recipe.path}: Ray deletes a job's working directory, so in this job it is "
            f"{place}; where there are more nodes, set it to a folder that all of them see"
        )
        return recipe.model_copy(update={"run_dir": str(place)})
    if _UNPACKED in recipe.path.resolve().parts:
        raise RecipeError(
            f"run_dir={recipe.path}: in a Ray job this is a folder of one node that Ray deletes "
            "with the job's files: set it to one on a file system that every node sees, "
            f"run_dir=/shared/runs/{recipe.name}"
        )
    return recipe


@contextmanager
def held(recipe: Recipe, part: str = "") -> Iterator[None]:
    """Keep other commands out of the run directory during the block, or for as long as it lives.

    With `part`, only out of that folder in it. Raises RecipeError when the directory cannot be
    written, or another command holds it.
    """
    folder = recipe.path / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").open("a").close()
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"run_dir={recipe.path}: cannot be written ({error.strerror}): set run_dir to a folder "
            "that can be, for example run_dir=/tmp/runs"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise RecipeError(_who_holds(folder, file.name)) from None
            console.warn(
                f"{folder}: its file system has no locks ({error.strerror}): "
                "see to it yourself that no other command writes there"
            )
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _who_holds(folder: Path, lock: str) -> str:
    holder = Path(lock).read_text(encoding="utf-8").strip() or "a command that is just starting"
    return (
        f"run_dir={folder}: another command writes there, {holder}: wait for it, stop it, "
        "or set another run_dir"
    )
