"""Imports go one way, as in the table of the layers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rayrlhf"
ORDER = (
    ("config", "metrics", "console", "lineage", "run_dir", "external", "algorithms"),
    ("session",),
    ("transfer",),
    ("data", "models", "generation"),
    ("training", "evaluation"),
    ("rl",),
    ("planning",),
    ("serving",),
    ("pipeline",),
    ("rounds", "doctor"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
NEVER = {
    "config": {"torch", "ray"},
    "metrics": {"torch", "ray"},
    "run_dir": {"torch", "ray"},
    "console": {"torch", "ray"},
    "lineage": {"torch", "ray"},
    "external": {"torch", "ray"},
    "algorithms": {"ray", "transformers"},
    "data": {"rayrlhf.models", "rayrlhf.training", "rayrlhf.rl", "vllm"},
    "models": {"ray", "rayrlhf.data", "rayrlhf.training", "deepspeed", "vllm"},
    "generation": {"ray", "rayrlhf.data", "rayrlhf.training", "deepspeed"},
    "transfer": {"ray", "transformers", "deepspeed"},
    "training": {"rayrlhf.rl", "rayrlhf.serving", "rayrlhf.generation", "vllm"},
    "evaluation": {"ray", "rayrlhf.training.loop", "rayrlhf.rl"},
    "rl": {"vllm", "ray.serve", "rayrlhf.cli"},
    "planning": {"ray.serve", "transformers", "vllm"},
    "serving": {"rayrlhf.training", "rayrlhf.rl"},
}
# These import nothing of rayrlhf but themselves.
ALONE = {"config", "metrics", "algorithms"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Names of all modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def starts(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    layer = package_of(file)
    if layer == "__init__":
        return
    for module in imports(file):
        assert not any(starts(module, name) for name in NEVER.get(layer, ())), (
            f"{layer} never imports {module}"
        )
        if module.startswith("rayrlhf."):
            other = module.split(".")[1]
            if other == "__version__":
                continue
            assert layer not in ALONE or other == layer, f"{layer} never imports {module}"
            assert LEVEL[other] <= LEVEL[layer], f"{layer} comes before {other}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "vllm",
            {"generation.py", "serving/engine.py", "transfer/gloo.py", "transfer/sender.py"},
        ),
        ("deepspeed", {"training/backend/deepspeed.py", "training/backend/ulysses.py"}),
    ],
)
def test_a_library_has_one_home(library: str, homes: set[str]) -> None:
    users = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if any(starts(module, library) for module in imports(file))
    }
    assert users == homes


def test_ray_remote_stands_where_processes_are_placed() -> None:
    users = [
        str(file.relative_to(PACKAGE))
        for file in FILES
        if "ray.remote" in file.read_text(encoding="utf-8").replace("`ray.remote", "")
    ]
    assert users == ["doctor/cluster.py", "rl/placement.py", "rounds/collect.py"]


def test_help_is_fast_and_light() -> None:
    code = (
        "import sys; from rayrlhf.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        after = os.times()  # of the processor: what else runs meanwhile does not count
        user, system = "children_user", "children_system"
        seconds.append(sum(getattr(after, key) - getattr(before, key) for key in (user, system)))
        assert said.stdout.rstrip().endswith("[]")
        assert "pipeline" in said.stdout
    assert min(seconds) < 1.0


def test_what_other_processes_import_first_is_light() -> None:
    """A controller of Ray Train and the tasks of a corpus: none of them computes with tensors."""
    code = (
        "import sys, rayrlhf.training.failures, rayrlhf.data.documents, rayrlhf.data.mixture\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.rstrip() == "[]"


def test_a_plan_needs_no_torch() -> None:
    """All of it but the probe, so that a plan is there at once, on any machine."""
    code = (
        "import sys; from rayrlhf.cli import main\n"
        "main(['plan', 'configs/llama-3.1-8b.yaml', '--cluster', '1x8xH100'])\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    before = os.times()
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    after = os.times()
    assert said.stdout.rstrip().endswith("[]")
    user, system = "children_user", "children_system"
    assert sum(getattr(after, key) - getattr(before, key) for key in (user, system)) < 2.0
