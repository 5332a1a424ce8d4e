"""A reward function is found and checked before anything expensive, and never in the driver."""

import os
from pathlib import Path

import pytest

from rayrlhf import pipeline
from rayrlhf.config import RecipeError, parse
from rayrlhf.external import functions
from rayrlhf.external.functions import check, load, place_of

KEY = "ppo.rewards.0.function=x"


def write(folder: Path, text: str) -> str:
    (folder / "style.py").write_text(text, encoding="utf-8")
    return str(folder / "style.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def score(:", "its import fails with SyntaxError"),
        ("raise SystemExit('bye')", "its import fails with SystemExit: bye"),
        ("def other(prompts, responses): ...", "style.py has no score: correct the name"),
        ("score = 3", "score is a int: name a function"),
        ("async def score(p, r): ...", "score is an async function"),
        ("def score(text): ...", "called with (prompts, responses), and score(text) does not fit"),
        ("def score(p, r, *, temperature): ...", "missing a required argument: 'temperature'"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(KEY, f"{write(tmp_path, text)}:score")
    assert str(error.value).startswith(KEY)
    assert said in str(error.value)


def test_functions_objects_and_modules_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Judge:\n    factor: float\n"
        "    def __call__(self, prompts, responses, more=None):\n"
        "        return [self.factor * len(text) for text in responses]\n"
        "score = Judge(2.0)\n"
    )
    file = write(tmp_path, text)
    assert load(KEY, f"{file}:score")(["a"], ["bc"]) == [4.0]
    assert load(KEY, f"{file}:score") is load(KEY, f"{file}:score")  # the file was run once
    monkeypatch.chdir(tmp_path)
    assert place_of("style.py:score") == f"{file}:score"
    assert place_of("package.module:score") == "package.module:score"
    assert load(KEY, "os.path:join") is not None
    with pytest.raises(RecipeError, match=r"no file .*/none\.py"):
        load(KEY, place_of("none.py:score"))
    with pytest.raises(RecipeError, match=r"No module named 'no_such'.*PYTHONPATH"):
        load(KEY, "no_such.module:score")


def test_the_driver_checks_in_another_process(tmp_path: Path) -> None:
    text = "import os\nopen('{}', 'a').write(str(os.getpid()))\n{}\n"
    seen = tmp_path / "seen"
    good = write(tmp_path, text.format(seen, "print('hello')\ndef score(p, r): return []"))
    check(KEY, f"{good}:score")
    assert int(seen.read_text()) != os.getpid()  # and no other process has imported it

    bad = write(tmp_path, text.format(seen, "print('hello')\nimport no_such_package"))
    with pytest.raises(RecipeError, match=f"{KEY}: its import fails with ModuleNotFoundError"):
        check(KEY, f"{bad}:score")
    died = write(tmp_path, text.format(seen, "os._exit(9)"))
    with pytest.raises(RecipeError, match="ends the process with code 9"):
        check(KEY, f"{died}:score")


def test_an_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "IMPORT_S", 0.5)
    file = write(tmp_path, "import time\ntime.sleep(60)\n")
    with pytest.raises(RecipeError, match=r"its import is not done after 0\.5 s"):
        check(KEY, f"{file}:score")


def test_a_pipeline_checks_its_functions_before_anything_else(tmp_path: Path) -> None:
    file = write(tmp_path, "def score(text): ...")
    recipe = parse(
        {
            "name": "x",
            "model": {"path": "acme/none"},
            "ppo": {"prompts": "none", "rewards": [{"function": f"{file}:score"}]},
        }
    )
    with pytest.raises(RecipeError) as error:
        pipeline.prepare(recipe)
    assert str(error.value).startswith(f"ppo.rewards.0.function={file}:score: it is called with")
