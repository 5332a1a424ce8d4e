"""What DeepSpeed compiles on first use, built by one process of a node at a time.

PyTorch guards a build with a file, which a killed process leaves behind and for which all later
ones wait, without a word and without end. Here whoever builds holds a lock that ends with its
process, in a folder that nobody else builds in, so a file that it finds is such a leftover.
"""

import fcntl
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rayrlhf import console

WAIT_S = 900.0
"""For another process that builds: a minute's work on one core, more on a busy node."""
NOTICE_S = 30.0
_OWN = "rayrlhf-"


def build(load: Callable[[], object], *, wait_s: float = WAIT_S) -> None:
    """Call `load`, which compiles what is not there yet, while no other process does.

    Raises TimeoutError when another one has not finished after `wait_s` seconds.
    """
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(place)
    with _alone(place / "building", wait_s):
        for leftover in place.glob("*/lock"):
            leftover.unlink()
        load()


def folder() -> Path:
    """Return where the builds of this environment are on this node, whose CPU they are for."""
    base = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    if base.name.startswith(_OWN):
        return base
    made_for = f"{sys.prefix} {torch.__version__} {socket.gethostname()}"
    return base / (_OWN + hashlib.sha256(made_for.encode()).hexdigest()[:12])


@contextmanager
def _alone(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock on a file in the block."""
    with path.open("w") as file:
        started = noticed = time.monotonic()
        while not _locked(file.fileno()):
            now = time.monotonic()
            if now - started > wait_s:
                raise TimeoutError(
                    f"{path}: another process has been compiling DeepSpeed's native parts for "
                    f"{wait_s:.0f} s: look for it with `fuser {path}`, end it, and start again"
                )
            if now - noticed > NOTICE_S:
                console.say(f"waiting for another process to compile in {path.parent}")
                noticed = now
            time.sleep(0.1)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
