"""A Python function of the user's in a process of its own, which can be ended whatever it does.

    here      {"prompts": [...], "responses": [...]}              a line of JSON each way
    there     {"scores": [...]}, or what went wrong

What the function prints goes to stderr, where its tracebacks are, too. The process, and what it
has started, end when a call is late; it ends with the one that started it, too.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from queue import SimpleQueue
from typing import Any

from rayrlhf.config import RecipeError
from rayrlhf.external.functions import IMPORT_S, environment, late_import, load

PR_SET_PDEATHSIG = 1
"""Linux's prctl(2): a signal when the thread that started this process ends."""


class FunctionDied(RuntimeError):
    """The process ended in the middle of a call."""


class FunctionProcess:
    """Calls the function there, one call at a time."""

    def __init__(self, key: str, where: str) -> None:
        """Import the function; `key` names it in errors, `where` is as `place_of` returns it.

        Raises RecipeError when it cannot be imported, or not within IMPORT_S. The thread that calls
        this, and `call`, has to last as long as the process.
        """
        self.key, self._where = key, where
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def call(self, prompts: list[str], responses: list[str], timeout_s: float) -> list[float]:
        """Return what the function gives for the lists.

        Raises TimeoutError when it takes longer than `timeout_s`: its process is ended, and the
        next call has another. Raises RuntimeError, with the function's error, when it raised,
        FunctionDied when its process ended, and RecipeError when it gave no list of numbers.
        """
        if self._process is None:
            self._start()
        ask = json.dumps({"prompts": prompts, "responses": responses})
        answer = self._exchange(ask, timeout_s)
        if answer is None:
            raise TimeoutError
        if "raised" in answer:
            raise RuntimeError(f"{self.key}: it raised {answer['raised']}")
        if "is_no_list" in answer:
            raise no_numbers(self.key, *answer["is_no_list"])
        scores: list[float] = answer["scores"]
        return scores

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._ends()
            self._process = None

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, self.key, self._where],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # what the function starts belongs to it
        )
        self._process, self._read = process, bytearray()
        self._ends = weakref.finalize(self, _end, process)
        try:
            said = self._exchange(None, IMPORT_S)
        except FunctionDied as error:
            raise RecipeError(f"{error}. It had not been called") from None
        if said is None:
            raise late_import(self.key)
        if "wrong" in said:
            self.close()
            raise RecipeError(said["wrong"])

    def _exchange(self, line: str | None, timeout_s: float) -> dict[str, Any] | None:
        """Send a line, and return the answer; None, and no process, when there is none in time."""
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        try:
            if line is not None:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                while b"\n" not in self._read:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        self.close()
                        return None
                    part = os.read(self._process.stdout.fileno(), 1 << 16)
                    if not part:
                        raise BrokenPipeError
                    self._read += part
        except BrokenPipeError:
            process, self._process = self._process, None
            self._ends()
            raise FunctionDied(
                f"{self.key}: its process ended with code {process.wait()}: see its stderr in the "
                "log of the reward worker"
            ) from None
        answer, _, rest = self._read.partition(b"\n")
        self._read = bytearray(rest)
        found: dict[str, Any] = json.loads(answer)
        return found


def no_numbers(key: str, kind: str, error: str) -> RecipeError:
    """Return the error for a `kind` in place of a list of numbers."""
    return RecipeError(
        f"{key}: it gave a {kind} that is no list of numbers ({error}): return one finite number "
        "for each response, in their order"
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, with all
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not sent has no reader
                pipe.close()


def _serve(key: str, where: str) -> None:
    """Answer line after line, until nobody asks any more."""
    if sys.platform == "linux":  # a thread that reads its stdin may never get to run
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the function prints is no answer

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")

    try:
        function = load(key, where)
    except RecipeError as error:
        say(wrong=str(error))
        return
    asked: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    say(ready=True)
    while True:
        body = json.loads(asked.get())
        try:
            values: Any = function(body["prompts"], body["responses"])
        except BaseException as error:
            traceback.print_exc()
            say(raised=f"{type(error).__name__}: {error}")
            continue
        try:
            say(scores=[float(value) for value in values])
        except Exception as error:
            say(is_no_list=[type(values).__name__, str(error)])


def _read(asked: "SimpleQueue[str]") -> None:
    """Read on while the function works: it ends with whoever wanted its answer."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
