"""The Slurm script among programs in place of Slurm, Ray and rayrlhf, which say what they heard."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayrlhf.cli import _parser
from tests.cluster.schemas import ROOT

SCRIPT = ROOT / "cluster" / "slurm" / "rayrlhf.sbatch"

STUBS = {
    # One task per node, and the end of one with an error is the end of all.
    "srun": """
        while [[ $1 != bash ]]; do shift; done
        echo "srun $SLURM_JOB_NUM_NODES" >>"$SAID"
        tasks=()
        for i in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_PROCID=$i "$@" & tasks+=($!); done
        trap 'kill "${tasks[@]}"; wait; exit 143' TERM
        wait
    """,
    "scontrol": """
        echo "scontrol $*" >>"$SAID"
        if [[ $1 == show ]]; then printf 'localhost\\nnode2\\n'; fi
    """,
    "ray": """
        if [[ $1 == health-check ]]; then [[ -e $SAID.up ]]; exit; fi
        if [[ -e $SAID.broken ]]; then echo "no disk" >&2; exit 7; fi
        sleep 60 & nap=$!
        trap 'echo "ray ended" >>"$SAID"; kill $nap; exit' TERM
        echo "ray $* token=${#RAY_AUTH_TOKEN} mode=$RAY_AUTH_MODE" >>"$SAID"
        if [[ $2 == --head && ! -e $SAID.silent ]]; then touch "$SAID.up"; fi
        wait
    """,
    "rayrlhf": """
        trap 'echo "rayrlhf interrupted" >>"$SAID"; exit 1' INT
        until [[ $(grep -c "^ray start" "$SAID") == "$SLURM_JOB_NUM_NODES" ]]; do sleep 0.1; done
        echo "rayrlhf $* at=$RAY_ADDRESS" >>"$SAID"
        for i in $(seq ${TAKES_S:-0}); do sleep 1 & wait; done
        exit ${CODE:-0}
    """,
}


@dataclass
class Slurm:
    """A folder of stubs, and the environment that Slurm gives to a job."""

    folder: Path
    env: dict[str, str]

    @property
    def said(self) -> list[str]:
        file = Path(self.env["SAID"])
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", SCRIPT, *words],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        job = self.start(*words, **env)
        out, err = job.communicate(timeout=60)
        return job.returncode, out, err

    def until(self, start: str) -> None:
        """Return when a stub has said something that begins so."""
        until = time.monotonic() + 30
        while not any(line.startswith(start) for line in self.said):
            assert time.monotonic() < until, f"{start}: {self.said}"
            time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    for name, text in STUBS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}", encoding="utf-8")
        file.chmod(0o755)
    env = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SAID": str(tmp_path / "said"),
        "RAYRLHF_BIN": str(tmp_path / "bin"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "localhost,node2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "4",
    }
    return Slurm(tmp_path, env)


JOB = ("pipeline", "configs/quickstart.yaml", "run_dir=/shared/runs/q", "seed=3")


def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [program, SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_head_and_workers_start_and_the_command_runs(slurm: Slurm) -> None:
    code, out, err = slurm.run(*JOB)
    assert code == 0, err
    (head,) = (line for line in slurm.said if line.startswith("ray start --head"))
    (worker,) = (line for line in slurm.said if line.startswith("ray start --address="))
    place = re.search(r"--address=([\d.]+:\d+)", worker)
    assert place is not None
    host, port = place[1].split(":")
    assert f"--node-ip-address={host} --port={port}" in head
    for line in (head, worker):
        assert "--block" in line and "--num-cpus=4" in line
        assert "token=64 mode=token" in line
    (ran,) = (line for line in slurm.said if line.startswith("rayrlhf "))
    words, _, address = ran.removeprefix("rayrlhf ").partition(" at=")
    assert address == place[1]
    args = _parser().parse_intermixed_args(words.split())
    assert (args.command, args.recipe) == JOB[:2]
    # What the user sets comes last, and wins.
    assert args.overrides == ["resources.wait_s=600", *JOB[2:]]
    assert slurm.said.count("ray ended") == 2
    assert "slurm: rayrlhf ended with 0" in out


def test_ports_fit(slurm: Slurm) -> None:
    code, _, err = slurm.run(*JOB, SLURM_JOB_ID="99999999")
    assert code == 0, err
    (head,) = (line for line in slurm.said if line.startswith("ray start --head"))
    ports = [int(port) for port in re.findall(r"port=(\d+)", head)]
    assert len(set(ports)) == 2
    assert max(ports) < 65536


@pytest.mark.parametrize("code", ["1", "2"])
def test_the_exit_code_is_that_of_the_command(slurm: Slurm, code: str) -> None:
    assert slurm.run(*JOB, CODE=code)[0] == int(code)
    assert not any("requeue" in line for line in slurm.said)
    assert slurm.said.count("ray ended") == 2


@pytest.mark.parametrize(("name", "requeued"), [("USR1", True), ("TERM", False)])
def test_a_signal_stops_the_command(slurm: Slurm, name: str, requeued: bool) -> None:
    job = slurm.start(*JOB, TAKES_S="50")
    slurm.until("rayrlhf pipeline")
    os.kill(job.pid, getattr(signal, f"SIG{name}"))
    out, err = job.communicate(timeout=30)
    assert job.returncode == 1, err
    assert "rayrlhf interrupted" in slurm.said
    assert ("scontrol requeue 12345" in slurm.said) == requeued
    assert slurm.said.count("ray ended") == 2


def test_a_command_that_is_done_is_not_queued_again(slurm: Slurm) -> None:
    job = slurm.start(*JOB, TAKES_S="1", CODE="0")
    slurm.until("rayrlhf pipeline")
    assert job.wait(30) == 0
    assert not any("requeue" in line for line in slurm.said)


def test_a_head_that_does_not_answer_ends_the_job(slurm: Slurm) -> None:
    Path(f"{slurm.env['SAID']}.silent").touch()
    code, _, err = slurm.run(*JOB, RAYRLHF_WAIT_S="2")
    assert code == 1
    assert "RAYRLHF_WAIT_S=2" in err
    assert not any(line.startswith("rayrlhf ") for line in slurm.said)


def test_a_ray_that_does_not_start_ends_the_job(slurm: Slurm) -> None:
    Path(f"{slurm.env['SAID']}.broken").touch()
    started = time.monotonic()
    code, _, err = slurm.run(*JOB, SLURM_JOB_NUM_NODES="1")
    assert code == 1
    assert "Ray ended before it was up" in err
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (("pipeline",), {}, "usage: sbatch"),
        (JOB, {"RAYRLHF_BIN": "/nowhere"}, "/nowhere/rayrlhf is not there"),
    ],
)
def test_what_is_wrong_exits_2(
    slurm: Slurm, words: tuple[str, ...], env: dict[str, str], says: str
) -> None:
    code, _, err = slurm.run(*words, **env)
    assert code == 2
    assert says in err
    assert slurm.said == []
