"""The Dockerfiles, as far as they can be checked without building an image."""

import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from rayrlhf import __version__
from tests.cluster.schemas import ROOT

FILES = sorted((ROOT / "cluster" / "docker").glob("Dockerfile.*"))
KINDS = [file.suffix.removeprefix(".") for file in FILES]


def instructions(kind: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and what follows them, continued lines joined."""
    text = (ROOT / "cluster" / "docker" / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (name, rest)
        for line in joined.splitlines()
        if line
        for name, _, rest in [line.partition(" ")]
    ]


def copied(kind: str) -> list[str]:
    """Return what is copied out of the repository."""
    found = []
    for name, rest in instructions(kind):
        if name == "COPY" and not rest.startswith("--from="):
            found += rest.split()[:-1]
    return found


def is_sent(path: str) -> bool:
    """Tell whether .dockerignore lets a path into the build's context: its last match decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.lstrip("!")
        if (
            line
            and not line.startswith("#")
            and any(
                fnmatch(part, pattern)
                for part in (path, *map(str, Path(path).parents))
                if part != "."
            )
        ):
            sent = line.startswith("!")
    return sent


def test_there_is_one_for_each_lock() -> None:
    assert KINDS == ["cpu", "gpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_finds_nothing(kind: str) -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [program, ROOT / "cluster" / "docker" / f"Dockerfile.{kind}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_is_there_and_sent(kind: str) -> None:
    sources = copied(kind)
    assert {"rayrlhf", "pyproject.toml", f"requirements/{kind}.txt", "configs", "jobs"} <= set(
        sources
    )
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    assert not any(
        map(is_sent, (".git/config", "runs/x/log.txt", ".venv/bin/python", "tests/x.py"))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_without_root_on_a_pinned_base(kind: str) -> None:
    found = instructions(kind)
    (user,) = (rest for name, rest in found if name == "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    run = next(rest for name, rest in reversed(found) if name == "RUN" and "useradd" in rest)
    assert f"--uid {user.split(':')[0]} " in run
    (base,) = (rest.removeprefix("BASE=") for name, rest in found if name == "ARG")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)
    stages = [rest.split() for name, rest in found if name == "FROM"]
    names = [stage[2] for stage in stages if len(stage) > 1]
    for stage in stages:
        assert stage[0] in ("${BASE}", *names)
    assert stages[-1] == ["${BASE}"]
    # What KubeRay's probes call.
    last = [rest for name, rest in found if name == "RUN" and "apt-get" in rest][-1]
    assert " wget " in last


def test_both_have_one_base() -> None:
    bases = [rest for kind in KINDS for name, rest in instructions(kind) if name == "ARG"]
    assert len(set(bases)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_its_name_is_that_of_the_manifests(kind: str) -> None:
    text = (ROOT / "cluster" / "docker" / f"Dockerfile.{kind}").read_text(encoding="utf-8")
    assert (
        f"docker build -f cluster/docker/Dockerfile.{kind} -t rayrlhf:{__version__}-{kind} ."
        in text
    )


def context(kind: str, folder: Path) -> None:
    """Copy what a Dockerfile copies."""
    for source in copied(kind):
        place = folder / source
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, place)


def script(kind: str, word: str) -> str:
    """Return the shell command of the RUN that has `word` in it."""
    (rest,) = (rest for name, rest in instructions(kind) if name == "RUN" and word in rest)
    return re.sub(r"^(--mount=\S+ +)+", "", rest)


def test_make_installs_the_lock_without_the_tools(tmp_path: Path) -> None:
    context("cpu", tmp_path)
    command = script("cpu", "requirements/cpu.txt").replace("make ", "make -n ")
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "-m venv --clear /opt/rayrlhf" in done.stdout
    assert "/opt/rayrlhf/bin/python -m pip" in done.stdout
    assert "-r requirements/cpu.txt" in done.stdout
    left = (tmp_path / "requirements" / "cpu.txt").read_text(encoding="utf-8")
    assert "torch==" in left and "pytest==" not in left and "hadolint" not in left


def test_the_gpu_lock_is_what_pip_is_given(tmp_path: Path) -> None:
    """Run the command with programs that say what they were asked for."""
    context("gpu", tmp_path)
    stub = tmp_path / "bin" / "pip"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n', encoding="utf-8")
    stub.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(stub)
    command = script("gpu", "requirements/gpu.txt").replace("/opt/rayrlhf", str(tmp_path))
    command = command.replace("python3 -m venv", "true")
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True, timeout=60)
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"install --no-deps --no-compile setuptools==[\d.]+", asked[0])
    assert asked[1].endswith("--no-build-isolation --use-pep517 -r requirements/gpu.txt")
    assert asked[2].startswith("-m compileall")
    left = (tmp_path / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    assert "vllm==" in left and "pytest==" not in left


def test_the_wheel_has_the_pages(tmp_path: Path) -> None:
    context("cpu", tmp_path)
    command = script("cpu", "pip wheel").replace("/opt/rayrlhf/bin/pip", f"{sys.executable} -m pip")
    command = command.replace("/dist", str(tmp_path / "dist"))
    subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True, timeout=120
    )
    (wheel,) = (tmp_path / "dist").glob("rayrlhf-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {
        str(file.relative_to(ROOT))
        for pattern in ("*.py", "*.html", "*.css", "*.js", "*.svg")
        for file in (ROOT / "rayrlhf").rglob(pattern)
    }
    assert here <= names
