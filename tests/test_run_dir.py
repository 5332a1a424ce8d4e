"""Where a run may be written, and that one command at a time writes there."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rayrlhf import cli, console, run_dir
from rayrlhf.config import Recipe, RecipeError, parse

HOLDER = """
import sys, time
from rayrlhf import run_dir
from rayrlhf.config import parse
recipe = parse({"name": "toy", "run_dir": sys.argv[1], "model": {"path": "m"}})
with run_dir.held(recipe):
    print("held", flush=True)
    time.sleep(600)
"""


def recipe_in(place: str | Path) -> Recipe:
    return parse({"name": "toy", "run_dir": str(place), "model": {"path": "m"}})


def file_of(folder: Path, place: str | Path) -> str:
    file = folder / "toy.yaml"
    file.write_text(
        f"name: toy\nrun_dir: {place}\nmodel: {{path: m}}\nsft: {{train: demos.jsonl}}\n"
    )
    return str(file)


@pytest.mark.parametrize("place", ["", "runs/toy", "./runs/toy"])
def test_a_relative_folder_of_a_job_lies_in_the_home_directory(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = recipe_in(place)
    assert run_dir.settle(recipe) is recipe  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    settled = run_dir.settle(recipe)
    assert settled.path == tmp_path / "runs/toy"
    assert settled.model_copy(update={"run_dir": place}) == recipe
    assert f"in this job it is {tmp_path}/runs/toy" in capsys.readouterr().err
    absolute = recipe_in(tmp_path)
    assert run_dir.settle(absolute) is absolute


def test_a_job_refuses_a_folder_among_its_unpacked_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    unpacked = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    with pytest.raises(RecipeError, match="every node sees"):
        run_dir.settle(recipe_in(unpacked / "runs"))
    assert cli.main(["sft", file_of(tmp_path, unpacked / "runs")]) == 2
    assert not unpacked.exists()


def test_a_folder_that_cannot_be_written_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["sft", file_of(tmp_path, tmp_path / "file" / "run")]) == 2
    said = capsys.readouterr().err
    assert "cannot be written (Not a directory): set run_dir" in said
    assert len(said.splitlines()) == 1


def test_the_second_command_exits_2_and_a_kill_frees_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(run)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert cli.main(["pipeline", file_of(tmp_path, run)]) == 2
        said = capsys.readouterr().err
        assert f"pid {first.pid} on {os.uname().nodename}" in said
        assert "wait for it, stop it, or set another run_dir" in said
        assert len(said.splitlines()) == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with run_dir.held(recipe_in(run)):
        assert (run / ".lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


def test_a_command_frees_the_folder_at_its_end(tmp_path: Path) -> None:
    for _ in range(2):
        with run_dir.held(recipe_in(tmp_path)):
            pass


def test_a_file_system_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with run_dir.held(recipe_in(tmp_path)):
        console.say("inside")
    said = capsys.readouterr()
    assert said.out == "inside\n"
    assert "has no locks (Operation not supported)" in said.err
