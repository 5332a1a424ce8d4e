"""Commands of the guides parse, and the files that they name are there."""

import re
import shlex
from pathlib import Path

import pytest

from rayrlhf import __version__
from rayrlhf.cli import _parser
from rayrlhf.config import load
from rayrlhf.planning import run
from tests.cluster.schemas import ROOT

FOLDER = ROOT / "cluster"
GUIDES = sorted(FOLDER.rglob("README.md"))


def commands(guide: Path) -> list[list[str]]:
    """Return the words of every line of the bash blocks, continued lines joined, pipes apart."""
    text = guide.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found: list[list[str]] = []
    for line in lines:
        found.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|"):
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def check_recipe(words: list[str]) -> None:
    """Fail unless these are a command of rayrlhf, with a recipe that has what it asks for."""
    if words[0] == "plan":
        args = run.arguments(words[1:])
        assert set(args.stage or ()) <= set(load(ROOT / args.recipe, args.overrides).stages)
        return
    args = _parser().parse_intermixed_args(words)
    recipe = load(ROOT / args.recipe, args.overrides)
    assert args.command in ("pipeline", "data") or args.command in recipe.stages


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.parent.name)
def test_commands_parse(guide: Path) -> None:
    for words in commands(guide):
        if words[:3] == ["ray", "job", "submit"]:
            python, job, *rest = words[words.index("--") + 1 :]
            assert python == "python" and (ROOT / job).is_file()
            assert "--working-dir" in words
            check_recipe([Path(job).stem, *rest])
            assert load(ROOT / rest[0], rest[1:]).path.is_absolute()
        elif words[0].endswith("rayrlhf"):
            check_recipe(words[1:])
        elif "rayrlhf" in words[:-1] and words[0] == "docker" and "run" in words:
            rest = words[words.index("rayrlhf") + 1 :]
            if rest != ["--version"]:
                check_recipe(rest)
        elif words[0] == "sbatch":
            place = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
            check_recipe(words[place + 1 :])


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.parent.name)
def test_what_is_named_is_there(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    for name in re.findall(r"(?:cluster|jobs|configs|requirements|tests)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (guide.parent / name).exists(), name
    for tag in re.findall(r"rayrlhf:(\d[\w.]*)-(?:cpu|gpu)", text):
        assert tag == __version__


def test_every_folder_has_a_guide_that_the_index_names() -> None:
    folders = {folder.name for folder in FOLDER.iterdir() if folder.is_dir()}
    assert {guide.parent.name for guide in GUIDES} == {*folders, "cluster"}
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {name for name in folders if f"({name}/README.md)" in index} == folders
