"""A Python function of the user's that scores responses: found, and checked.

`check` imports it in a process of its own, so that a function that cannot be imported or called
ends the run before anything expensive starts, and its import leaves nothing in the caller.
"""

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from rayrlhf.config import RecipeError

Function = Callable[[list[str], list[str]], Sequence[float]]
IMPORT_S = 300.0
"""Longest that the import of a function may take."""


def place_of(function: str) -> str:
    """Return `package.module:name`, or `file.py:name` with an absolute path."""
    where, _, name = function.rpartition(":")
    return f"{Path(where).absolute()}:{name}" if where.endswith(".py") else function


def load(key: str, where: str) -> Function:
    """Import a function; `key` names it in errors.

    Raises RecipeError when it cannot be imported or does not take two arguments.
    """
    source, _, name = where.rpartition(":")
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise RecipeError(f"{key}: there is no file {source}: correct the path")
    try:
        module = _load_file(Path(source)) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        hint = (
            ""
            if is_file
            else "; workers look where they run, on PYTHONPATH and among what is installed"
        )
        raise RecipeError(
            f"{key}: its import fails with {type(error).__name__}: {error}{hint}"
        ) from error
    if name not in vars(module):
        raise RecipeError(f"{key}: {source} has no {name}: correct the name")
    function: Function = vars(module)[name]
    if not callable(function):
        raise RecipeError(f"{key}: {name} is a {type(function).__name__}: name a function")
    if inspect.iscoroutinefunction(function):
        raise RecipeError(
            f"{key}: {name} is an async function: name a plain one, which may call asyncio.run"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some built in C, which the first call checks
        return function
    try:
        signature.bind([], [])
    except TypeError as error:
        raise RecipeError(
            f"{key}: it is called with (prompts, responses), and {name}{signature} does not fit "
            f"({error}): let it take two lists of strings"
        ) from None
    return function


def check(key: str, where: str) -> None:
    """Raise RecipeError as `load` does, after an import in a process of its own."""
    try:
        said = subprocess.run(
            [sys.executable, "-m", __spec__.name, key, where],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise late_import(key) from None
    if said.returncode:
        lines = said.stdout.splitlines() or [""]
        if lines[-1].startswith("{"):
            raise RecipeError(json.loads(lines[-1])["wrong"])
        last = (said.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise RecipeError(
            f"{key}: its import ends the process with code {said.returncode}: {last[:300]}"
        )


def environment() -> dict[str, str]:
    """Return that of a process that finds a function where this one does."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def late_import(key: str) -> RecipeError:
    """Return the error for an import that takes longer than IMPORT_S."""
    return RecipeError(
        f"{key}: its import is not done after {IMPORT_S:g} s: let the function load what takes "
        "longer when it is called first"
    )


def _load_file(path: Path) -> ModuleType:
    """Import a file under a name that no package has, once however many functions are in use."""
    spec = importlib.util.spec_from_file_location(f"rayrlhf_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "it ends in .py"
    known = sys.modules.get(spec.name)
    if known is not None and known.__file__ == str(path):
        return known
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _main(key: str, where: str) -> None:
    """Say on the last line what is wrong, and end without whatever the user's code left behind."""
    code = 0
    try:
        load(key, where)
    except RecipeError as error:
        print("\n" + json.dumps({"wrong": str(error)}))
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main(*sys.argv[1:])
