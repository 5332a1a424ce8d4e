"""A function in a process of its own: what it gives, and what happens when it does not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayrlhf.config import RecipeError
from rayrlhf.external.function_process import FunctionDied, FunctionProcess

CODE = """
import os
import re
import subprocess
import time

calls = 0

def length(prompts, responses):
    print("working")
    return [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]

def count(prompts, responses):
    global calls
    calls += 1
    return [calls]

def backtrack(prompts, responses):  # never lets another thread run
    return [float(bool(re.match(r"(a+)+$", response))) for response in responses]

def dies(prompts, responses):
    if responses == ["die"]:
        os._exit(3)
    return [1.0]

def starts(prompts, responses):
    other = subprocess.Popen(["sleep", "60"])
    with open(os.path.join(os.path.dirname(__file__), "other"), "w") as file:
        file.write(str(other.pid))
    time.sleep(60)

def broken(prompts, responses):
    return {}["key"]

def infinite(prompts, responses):
    return [10**400]

def words(prompts, responses):
    return ["good"]
"""
SLOW = "a" * 40 + "b"


@pytest.fixture
def code(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "code.py"
    file.write_text(CODE, encoding="utf-8")
    yield str(file)
    # No test leaves a process behind.
    for each in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # another one's, that ends just now
            assert str(file) not in " ".join(each.cmdline())


def test_its_numbers_come_back_whatever_it_prints(code: str) -> None:
    process = FunctionProcess("key", f"{code}:length")
    texts = ["a" * 200_000, "\ud83d lone", "line\nbreak"]  # more than a pipe holds
    assert process.call(["x"] * 3, texts, 30) == [200_001, 7, 11]
    process.close()


def test_what_it_keeps_stays_between_calls(code: str) -> None:
    process = FunctionProcess("key", f"{code}:count")
    assert [process.call(["x"], ["y"], 30) for _ in range(2)] == [[1], [2]]
    process.close()


def test_a_call_that_is_late_is_ended_whatever_it_does(code: str) -> None:
    process = FunctionProcess("key", f"{code}:backtrack")
    assert process.call(["x"] * 2, ["aaa", "ab"], 30) == [1, 0]
    assert process._process is not None
    child = psutil.Process(process._process.pid)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        process.call(["x"], [SLOW], 0.5)
    assert time.monotonic() - began < 5 and not child.is_running()
    assert process.call(["x"], ["aaa"], 30) == [1]
    process.close()


def test_one_that_dies_says_its_code_and_is_started_again(code: str) -> None:
    process = FunctionProcess("key", f"{code}:dies")
    with pytest.raises(FunctionDied, match="^key: its process ended with code 3"):
        process.call(["x"], ["die"], 30)
    assert process.call(["x"], ["live"], 30) == [1]
    process.close()


def test_its_errors_name_the_key(code: str) -> None:
    process = FunctionProcess("key", f"{code}:broken")
    with pytest.raises(RuntimeError, match="^key: it raised KeyError: 'key'$"):
        process.call(["x"], ["y"], 30)
    process.close()
    for name in ("words", "infinite"):
        process = FunctionProcess("key", f"{code}:{name}")
        said = r"^key: it gave a list that is no list of numbers \("
        with pytest.raises(RecipeError, match=said):
            process.call(["x"], ["y"], 30)
        process.close()
    with pytest.raises(RecipeError, match="^key: .* has no nothing"):
        FunctionProcess("key", f"{code}:nothing")


def test_what_it_started_ends_with_it(code: str) -> None:
    process = FunctionProcess("key", f"{code}:starts")
    with pytest.raises(TimeoutError):
        process.call(["x"], ["y"], 2)
    other = psutil.Process(int(Path(code).with_name("other").read_text()))
    psutil.wait_procs([other], timeout=20)
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("function", ["length", "backtrack"])
def test_it_ends_with_who_started_it(code: str, function: str) -> None:
    """Idle, or busy in what never lets its other threads run."""
    program = (
        "import sys, time\n"
        "from rayrlhf.external.function_process import FunctionProcess\n"
        "process = FunctionProcess('key', sys.argv[1])\n"
        "print(process._process.pid, flush=True)\n"
        f"process.call(['x'], ['{SLOW}'], 60)\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program, f"{code}:{function}"], stdout=subprocess.PIPE, env=env
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1.0)  # it is in the call by now
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        psutil.wait_procs([child], timeout=20)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
