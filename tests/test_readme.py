"""Every command of the README parses, with the recipe and the files that it names."""

import re
import shlex
from pathlib import Path

import pytest

from rayrlhf.cli import COMMANDS
from rayrlhf.config import load

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return the words of every line of the README's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMAND_LINES = [c for c in commands() if c[0] != "make"]


@pytest.mark.parametrize("words", COMMAND_LINES, ids=lambda words: " ".join(words)[:60])
def test_a_command_parses(words: list[str]) -> None:
    if words[0] == ".venv/bin/rayrlhf":
        command, recipe, *overrides = words[1:]
    else:
        assert words[:6] == ["ray", "job", "submit", "--working-dir", ".", "--"]
        assert words[6] == "python"
        job, recipe, *overrides = words[7:]
        assert (ROOT / job).is_file()
        command = Path(job).stem
        # A relative one would be lost with the job's files.
        assert load(ROOT / recipe, overrides).path.is_absolute()
    assert command in COMMANDS
    assert command == "pipeline" or command in load(ROOT / recipe, overrides).stages


def test_the_readme_shows_jobs_with_gpus() -> None:
    jobs = [words for words in COMMAND_LINES if words[0] == "ray"]
    assert len(jobs) >= 2
    assert any("resources.rollout.gpus=1" in words for words in jobs)


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {words[1] for words in commands() if words[0] == "make"} <= targets


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= 220
