"""Compiling DeepSpeed's parts: nobody waits for a killed process, or without a word or an end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayrlhf.training.backend import native_ops

HOLDER = """
import sys, time
from rayrlhf.training.backend import native_ops
native_ops.build(lambda: (print("building", flush=True), time.sleep(600)))
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def test_what_a_killed_build_left_is_no_lock(tmp_path: Path) -> None:
    place = native_ops.folder()
    assert place.parent == tmp_path
    left = place / "deepspeed_shm_comm" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()
    found = []
    native_ops.build(lambda: found.append(left.exists()))
    assert found == [False]
    # What torch builds now, it builds there; a second call does not go one folder deeper.
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(place) == str(native_ops.folder())


def test_a_live_build_is_waited_for_and_a_killed_one_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_ops, "NOTICE_S", 0.2)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "building\n"
        called: list[int] = []
        with pytest.raises(TimeoutError, match=r"building: another process .* `fuser "):
            native_ops.build(lambda: called.append(1), wait_s=0.5)
        assert not called
        assert "waiting for another process to compile" in "".join(capsys.readouterr())
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    started = time.monotonic()
    native_ops.build(lambda: called.append(1), wait_s=5)
    assert called == [1] and time.monotonic() - started < 5
