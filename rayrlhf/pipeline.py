"""All stages of a recipe in their order; a stage that is complete and unchanged is skipped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from rayrlhf import console, lineage, metrics, session
from rayrlhf.config import TRAINED_STAGES, Recipe, RecipeError
from rayrlhf.data import builtin, storage
from rayrlhf.data.files import data_files

SHOWN = {
    "pretrain": {"loss": "loss", "learning_rate": "lr", "tokens_per_s": "tok/s"},
    "sft": {"loss": "loss", "learning_rate": "lr", "tokens_per_s": "tok/s"},
    "reward": {"loss": "loss", "pair_accuracy": "accuracy", "learning_rate": "lr"},
    "ppo": {
        "reward/score_mean": "score",
        "kl/ref_per_response": "KL",
        "kl/coef": "beta",
        "policy/entropy": "entropy",
        "rollout/response_length": "length",
        "time/step_s": "s",
    },
}


def prepare(recipe: Recipe) -> None:
    """Check all data and all resources that the recipe's stages ask for, before any of them runs.

    Raises RecipeError with the file and line, or with the resource that the cluster lacks.
    """
    builtin.prepare(recipe)
    session.connect(recipe)
    for stage in recipe.stages:
        session.require(
            recipe.resources.bundles(stage), wait_s=recipe.resources.wait_s, stage=stage
        )


@contextmanager
def tracked(recipe: Recipe, stage: str) -> Iterator[bool]:
    """Yield whether `stage` has to run; show its progress, and record its lineage at the end.

    A run with other inputs than those that the stage's folder was begun with is moved aside to
    `<stage>.previous`; with the same inputs, the stage resumes from its newest checkpoint.
    """
    for before in lineage.UPSTREAM[stage]:
        if before in recipe.stages and not (recipe.path / lineage.OUTPUTS[before]).exists():
            raise RecipeError(
                f"{stage} reads {recipe.path / lineage.OUTPUTS[before]}, which is not "
                f"there yet: run `rayrlhf {before}` or `rayrlhf pipeline` first"
            )
    read = _inputs(recipe, stage)
    if lineage.is_current(recipe, stage, read):
        console.say(f"{stage:>9} unchanged, nothing to do")
        yield False
        return
    folder = recipe.path / Path(lineage.OUTPUTS[stage]).parts[0]
    _begin(recipe, stage, folder, read)
    (recipe.path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    started = time.monotonic()
    progress = (
        console.Progress(stage, _interval(recipe, stage), SHOWN[stage]) if stage in SHOWN else None
    )
    if progress is None:
        yield True
    else:
        try:
            with metrics.follow(folder, progress.show):
                yield True
        finally:
            progress.close()
    seconds = time.monotonic() - started
    lineage.record(recipe, stage, read, seconds)
    console.say(f"{stage:>9} done in {seconds:.0f} s: {recipe.path / lineage.OUTPUTS[stage]}")


def is_current(recipe: Recipe, stage: str) -> bool:
    """Tell whether `stage` is complete, and nothing that it reads has changed since."""
    return lineage.is_current(recipe, stage, _inputs(recipe, stage))


def _inputs(recipe: Recipe, stage: str) -> dict[str, str]:
    """Return the hashes of what `stage` reads: its data files and local start model, and more."""
    data = {
        f"{stage}.{named.key}": storage.fingerprint(named.path)
        for named in data_files(recipe)
        if named.stage == stage
    }
    if stage == "corpus" and recipe.corpus is not None:
        for path in recipe.corpus.decontaminate:
            data[f"corpus.decontaminate.{path}"] = storage.fingerprint(path)
    files: dict[str, Path] = {}
    if stage in (*TRAINED_STAGES, "ppo"):
        section = getattr(recipe, stage)
        start = getattr(section, "init", None) or recipe.model.path
        # The weights behind a hub's name are the hub's to keep: the recipe's hash covers the name.
        if start is not None and (folder := Path(builtin.resolve(start))).exists():
            files[f"{stage}.init.0"] = folder
    return lineage.inputs(recipe, stage, files) | data


def _interval(recipe: Recipe, stage: str) -> int:
    """Steps between two lines of `stage` where there is no terminal."""
    if stage == "ppo":
        return 5
    section = {"pretrain": recipe.pretrain, "sft": recipe.sft, "reward": recipe.reward}[stage]
    assert section is not None
    return section.log_every


def _begin(recipe: Recipe, stage: str, folder: Path, read: dict[str, str]) -> None:
    """Keep the folder of the same work; move the folder of other work aside."""
    path = recipe.path / "begun.json"
    begun = lineage.read_json(path)
    if folder.exists() and begun.get(stage) != read:
        previous = folder.with_name(f"{folder.name}.previous")
        if previous.exists():
            previous = folder.with_name(f"{folder.name}.previous-{int(time.time())}")
        folder.rename(previous)
        console.say(f"{folder}: begun with other inputs, moved to {previous}")
    folder.mkdir(parents=True, exist_ok=True)
    lineage.write_json(path, {**begun, stage: read})
