"""What a recipe asks of the nodes: their resources, and files that each of them reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray._private import state as ray_state

from rayrlhf import session
from rayrlhf.config import TRAINED_STAGES, Recipe, RecipeError
from rayrlhf.data import builtin
from rayrlhf.data.files import data_files
from rayrlhf.doctor.findings import Finding, fail, ok, warn
from rayrlhf.rl.layout import plan


def resources(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Compare what each stage asks for with what the nodes have, and with what is free."""
    alive = {each["NodeID"]: each["Resources"] for each in ray.nodes() if each["Alive"]}
    free = ray_state.available_resources_per_node()
    found = []
    for stage in recipe.stages:
        if stage == "rounds":  # what its own reward and ppo ask for
            continue
        try:
            bundles = (
                plan(recipe, [dict(node) for node in nodes]).demand
                if stage == "ppo"
                else recipe.resources.bundles(stage)
            )
        except RecipeError as error:
            found.append(_short(str(error), recipe.resources.wait_s))
            continue
        missing = session.shortage(bundles, nodes)
        if missing is not None:
            found.append(_short(f"{stage}: {missing}", recipe.resources.wait_s))
            continue
        busy = session.in_use(bundles, list(alive.values()), [free.get(node, {}) for node in alive])
        asked = ", ".join(
            f"{sum(bundle.get(name, 0) for bundle in bundles):g} {name}"
            for name in ("CPU", "GPU")
            if any(bundle.get(name, 0) for bundle in bundles)
        )
        if busy is not None:
            value, _, fix = busy.partition(": wait for it")
            found.append(warn("resources", f"{stage}: {value}", f"wait for it{fix}"))
        else:
            found.append(ok("resources", f"{stage}: {asked} on {len(bundles)} worker(s) fit"))
    return found


def _short(text: str, wait_s: float) -> Finding:
    """Split a shortage into what is missing and what to do; an autoscaler may still bring it."""
    value, _, fix = text.rpartition(": ")
    kind = warn if wait_s > 0 else fail
    return kind("resources", value, fix)


def paths(recipe: Recipe) -> dict[str, str]:
    """Return the local files and folders that workers read, by their key in the recipe.

    Names of a hub and of buckets are left out: their nodes fetch them. A pattern stands for its
    folder, and a path that is relative for the one below the working directory.
    """
    named: dict[str, str | None] = {
        "model.path": recipe.model.path,
        "tokenizer.path": recipe.tokenizer.path,
        **{f"{stage}.init": _init(recipe, stage) for stage in (*TRAINED_STAGES, "ppo")},
        **{f"{file.stage}.{file.key}": file.path for file in data_files(recipe)},
    }
    found = {}
    for key, name in named.items():
        if name is None or "://" in name or name.startswith(builtin.PREFIX):
            continue
        path = Path(name)
        if any(letter in name for letter in "*?["):
            path = Path(next(p for p in path.parents if not any(c in str(p) for c in "*?[")))
        is_of_a_hub = name.count("/") <= 1 and not path.is_absolute() and not path.exists()
        is_written_here = path.absolute().is_relative_to(recipe.path.absolute())
        if not (
            is_written_here or (is_of_a_hub and "." not in key.partition(".")[2] and key in _MODELS)
        ):
            found[key] = str(path.absolute())
    return found


_MODELS = {"model.path", "tokenizer.path", *(f"{s}.init" for s in (*TRAINED_STAGES, "ppo"))}


def _init(recipe: Recipe, stage: str) -> str | None:
    section = recipe.ppo if stage == "ppo" else recipe.training(stage)
    return None if section is None else section.init
