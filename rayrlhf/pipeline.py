"""All stages of a recipe in their order; a stage that is complete and unchanged is skipped."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from rayrlhf import console, lineage, metrics, run_dir, session
from rayrlhf.config import TRAINED_STAGES, EvaluateConfig, PPOConfig, Recipe, RecipeError, judge_key
from rayrlhf.data import builtin, storage
from rayrlhf.data.files import data_files
from rayrlhf.external import functions
from rayrlhf.external.endpoints import authorization
from rayrlhf.rl.layout import plan
from rayrlhf.rl.reward_function import check_functions

SHOWN = {
    "pretrain": {"loss": "loss", "learning_rate": "lr", "tokens_per_s": "tok/s"},
    "sft": {"loss": "loss", "learning_rate": "lr", "tokens_per_s": "tok/s"},
    "reward": {"loss": "loss", "pair_accuracy": "accuracy", "learning_rate": "lr"},
    "dpo": {"loss": "loss", "pair_accuracy": "accuracy", "reward_margin": "margin"},
    "ppo": {
        "reward/score_mean": "score",
        "kl/ref_per_response": "KL",
        "kl/coef": "beta",
        "policy/entropy": "entropy",
        "rollout/response_length": "length",
        "time/step_s": "s",
    },
}

TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Files beside a tokenizer, with endings like its own, that say nothing of it."""


def prepare(recipe: Recipe) -> None:
    """Check all data, models and resources that the recipe's stages ask for, before any of them.

    Raises RecipeError with the file and line, the model, or the resource that the cluster lacks.
    """
    require_reward_model(recipe)
    check_functions(recipe)
    check_judges(recipe)
    check_models(recipe)
    builtin.prepare(recipe)
    session.connect(recipe)
    for stage in recipe.stages:
        if stage == "rounds":  # what its own reward and ppo ask for
            continue
        bundles = plan(recipe).demand if stage == "ppo" else recipe.resources.bundles(stage)
        session.require(bundles, wait_s=recipe.resources.wait_s, stage=stage)


def require_trackers(recipe: Recipe) -> None:
    """Raise RecipeError when a tracker's package is not installed, or its address not set."""
    for tracker in recipe.tracking:
        if not metrics.is_installed(tracker):
            raise RecipeError(
                f"tracking=[{tracker}] needs a package that is not installed: "
                f"pip install {metrics.PACKAGES[tracker]}, or take {tracker} out of tracking"
            )
        variable = metrics.ADDRESSES.get(tracker)
        if variable is not None and not os.environ.get(variable):
            raise RecipeError(
                f"tracking=[{tracker}] needs the address of a server: set {variable}, for example "
                "to http://127.0.0.1:5000"
            )


def require_reward_model(recipe: Recipe) -> None:
    """Raise RecipeError when PPO has no reward model: none is trained, and none is there.

    What `ppo.rewards` names in place of it, `check_models` and PPO itself look at.
    """
    if recipe.ppo is not None and not recipe.ppo.rewards and recipe.reward is None:
        folder = recipe.path / lineage.OUTPUTS["reward"]
        if not (folder / "config.json").is_file():
            raise RecipeError(
                f"ppo scores with {folder}, but the recipe has no reward section and nothing is "
                "there: add reward, put a finished reward model into that folder, or set "
                "ppo.rewards"
            )


def check_judges(recipe: Recipe) -> None:
    """Raise RecipeError for the function of a judge that does not load, or a missing key.

    Whether an endpoint answers is asked when the evaluation begins: it need not be up before.
    """
    for place, judge in recipe.judges.items():
        if judge.function is not None:
            functions.check(judge_key(place, judge), functions.place_of(judge.function))
        if judge.url is not None:
            authorization(judge_key(place, judge), judge.key_env)


def check_models(recipe: Recipe) -> None:
    """Read the head of every model that the recipe names: its config, and its vocabulary.

    Raises RecipeError when one cannot be read, or the tokenizer that is named does not fit it.
    Models of `evaluate` have tokenizers of their own, which the evaluation looks at.
    """
    inits = {f"{stage}.init": _init(recipe, stage) for stage in (*TRAINED_STAGES, "ppo")}
    guests = _battle_models(recipe)
    models = {"model.path": recipe.model.path, **inits, **_named_rewards(recipe), **guests}
    named = {
        key: builtin.resolve(name)
        for key, name in models.items()
        if name is not None and not _is_written_here(recipe, name)
    }
    if not named and _tokenizer_source(recipe) is None:
        return
    # Only here: a recipe that names neither starts without waiting for torch.
    from rayrlhf.data.tokenizer import check_vocabulary, load_tokenizer
    from rayrlhf.models.folder import load_config

    tokenizer = None
    if _tokenizer_source(recipe) is not None:
        _renew_tokenizer(recipe)
        tokenizer = load_tokenizer(recipe)
    for key, path in named.items():
        try:
            config = load_config(path)
            if tokenizer is not None and key not in guests:
                check_vocabulary(tokenizer, config.vocab_size)
        except RecipeError as error:
            raise RecipeError(f"{key}: {error}") from None
        if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
            raise RecipeError(
                f"{key}: {path}: no *.safetensors there: give a folder with config.json and "
                "model.safetensors"
            )


@contextmanager
def tracked(recipe: Recipe, stage: str) -> Iterator[bool]:
    """Yield whether `stage` has to run; show its progress, and record its lineage at the end.

    A run with other inputs than those that the stage's folder was begun with is moved aside to
    `<stage>.previous`; with the same inputs, the stage resumes from its newest checkpoint.
    """
    if stage == "ppo":
        require_reward_model(recipe)
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
    _renew_tokenizer(recipe)
    if stage == "ppo" and recipe.ppo is not None:
        console.say(derived_numbers(recipe.ppo, recipe))
    started = time.monotonic()
    with _shown(recipe, stage):
        yield True
    seconds = time.monotonic() - started
    lineage.record(recipe, stage, read, seconds)
    console.say(f"{stage:>9} done in {seconds:.0f} s: {recipe.path / lineage.OUTPUTS[stage]}")


@contextmanager
def _shown(recipe: Recipe, stage: str) -> Iterator[None]:
    """Show the progress of a trained stage, of each of its models."""
    with ExitStack() as stack:
        for name in lineage.outputs_of(recipe, stage) if stage in SHOWN else ():
            folder = recipe.path / Path(name).parent
            progress = console.Progress(
                ".".join((stage, *Path(name).parts[2:-1])), _interval(recipe, stage), SHOWN[stage]
            )
            stack.callback(progress.close)
            stack.enter_context(metrics.follow(folder, progress.show))
        yield


def derived_numbers(cfg: PPOConfig, recipe: Recipe) -> str:
    """Return the line on what follows from PPO's batch sizes."""
    ranks = recipe.resources.actor.num_workers
    return (
        f"{'ppo':>9} {cfg.steps} steps of {cfg.num_responses} responses ({cfg.batch_size} prompts "
        f"x {cfg.samples_per_prompt}), {cfg.num_minibatches * cfg.epochs} updates a step on "
        f"{cfg.minibatch_size} responses each, {cfg.minibatch_size // ranks} per rank on {ranks}"
    )


def is_current(recipe: Recipe, stage: str) -> bool:
    """Tell whether `stage` is complete, and nothing that it reads has changed since."""
    return lineage.is_current(recipe, stage, _inputs(recipe, stage))


def _inputs(recipe: Recipe, stage: str) -> dict[str, str]:
    """Return the hashes of what `stage` reads: its data files and local start model, and more."""
    data = {
        f"{named.stage}.{named.key}": storage.fingerprint(named.path)
        for named in data_files(recipe)
        if named.stage == stage or (stage == "rounds" and named.stage in lineage.ROUND)
    }
    if stage == "corpus" and recipe.corpus is not None:
        for path in recipe.corpus.decontaminate:
            data[f"corpus.decontaminate.{path}"] = storage.fingerprint(path)
    if stage == "pretrain" and recipe.pretrain is not None and recipe.pretrain.corpus is not None:
        manifest = f"{recipe.pretrain.corpus.rstrip('/')}/manifest.json"
        data["pretrain.corpus.manifest"] = storage.fingerprint(manifest)
    if (tokenizer := _tokenizer_hash(recipe)) is not None:
        data["tokenizer"] = tokenizer
    files: dict[str, Path] = {}
    if stage in (*TRAINED_STAGES, "ppo", "evaluate"):
        start = _init(recipe, stage) or recipe.model.path
        # The weights behind a hub's name are the hub's to keep: the recipe's hash covers the name.
        if start is not None and (folder := Path(builtin.resolve(start))).exists():
            files[f"{stage}.init.0"] = folder
    if stage == "ppo":
        files |= _scoring_files(recipe)
    if stage == "evaluate" and recipe.evaluate is not None:
        files |= _gold_files(recipe.evaluate)
    if stage in ("rounds", "evaluate"):
        files |= _battle_files(recipe, stage)
    return lineage.inputs(recipe, stage, files) | data


def _named_rewards(recipe: Recipe) -> dict[str, str]:
    """Return the reward models that `ppo.rewards` names, by their key in the recipe."""
    if recipe.ppo is None:
        return {}
    return {
        f"ppo.rewards.{index}.{reward.kind}" + (f".{number}" if len(names) > 1 else ""): name
        for index, (reward, names) in enumerate(
            zip(recipe.ppo.rewards, lineage.scoring_models(recipe), strict=False)
        )
        for number, name in enumerate(names)
    }


def _scoring_files(recipe: Recipe) -> dict[str, Path]:
    """Return what scores PPO's responses, where it is local and not of the recipe's own stage."""
    assert recipe.ppo is not None
    if not recipe.ppo.rewards:
        judge = recipe.path / lineage.OUTPUTS["reward"]
        return {"ppo.reward": judge} if recipe.reward is None and judge.exists() else {}
    is_known = recipe.reward is not None  # by the lineage of its stage
    places = {
        key: name
        for key, name in _named_rewards(recipe).items()
        if not (is_known and _is_written_here(recipe, name))
    }
    for index, reward in enumerate(recipe.ppo.rewards):
        if reward.function is not None:
            places[f"ppo.rewards.{index}.function"] = functions.place_of(
                reward.function
            ).rpartition(":")[0]
    files = {key: Path(builtin.resolve(place)) for key, place in places.items()}
    return {key: file for key, file in files.items() if file.exists()}


def _battle_models(recipe: Recipe) -> dict[str, str]:
    """Return the models that do nothing but fight or judge, by their key in the recipe."""
    models = recipe.evaluate.models if recipe.evaluate is not None else {}
    fighting = {f"evaluate.models.{name}": path for name, path in models.items()}
    judging = {
        f"{place}.model": judge.model
        for place, judge in recipe.judges.items()
        if judge.model is not None
    }
    return fighting | judging


def _battle_files(recipe: Recipe, stage: str) -> dict[str, Path]:
    """Return who fights and judges in a stage, where it is local and of no stage."""
    places = {
        key: name
        for key, name in _battle_models(recipe).items()
        if key.startswith(f"{stage}.") and not _is_written_here(recipe, name)
    }
    for place, judge in recipe.judges.items():
        if judge.function is not None and place.startswith(f"{stage}."):
            file = functions.place_of(judge.function).rpartition(":")[0]
            places[f"{place}.function"] = file
    files = {key: Path(builtin.resolve(place)) for key, place in places.items()}
    return {key: file for key, file in files.items() if file.exists()}


def _gold_files(cfg: EvaluateConfig) -> dict[str, Path]:
    """Return the gold reward model that the evaluation names, where it is there."""
    cost = cfg.overoptimisation
    if cost is None or cost.gold is None or not Path(cost.gold).exists():
        return {}
    return {"evaluate.overoptimisation.gold": Path(cost.gold)}


def _init(recipe: Recipe, stage: str) -> str | None:
    """Return the model that the section of `stage` names to start from."""
    section = recipe.ppo if stage == "ppo" else recipe.training(stage)
    return None if section is None else section.init


def _is_written_here(recipe: Recipe, name: str) -> bool:
    """Tell whether a model is one that an earlier stage of this run leaves."""
    return Path(name).absolute().is_relative_to(recipe.path.absolute())


def _tokenizer_source(recipe: Recipe) -> str | None:
    return recipe.tokenizer.path or recipe.model.path


def _tokenizer_hash(recipe: Recipe) -> str | None:
    """Return the hash of the files of the tokenizer that the recipe names, if they are local."""
    source = _tokenizer_source(recipe)
    if source is None or not (folder := Path(builtin.resolve(source))).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in TOKENIZER_FILES and file.name not in MODEL_FILES:
            digest.update(f"{file.name}\0{lineage.hash_path(file)}\0".encode())
    return digest.hexdigest()


def _renew_tokenizer(recipe: Recipe) -> None:
    """Remove the run's copy of a named tokenizer when the files there are no longer the same."""
    path = recipe.path / lineage.BEGUN
    begun = lineage.read_json(path)
    found = _tokenizer_hash(recipe)
    if found is not None and begun.get("tokenizer") != found:
        shutil.rmtree(recipe.path / "tokenizer", ignore_errors=True)
        lineage.write_json(path, {**begun, "tokenizer": found})


def _interval(recipe: Recipe, stage: str) -> int:
    """Steps between two lines of `stage` where there is no terminal."""
    if stage == "ppo":
        return 5
    section = recipe.training(stage)
    assert section is not None
    return section.log_every


def _begin(recipe: Recipe, stage: str, folder: Path, read: dict[str, str]) -> None:
    """Keep the folder of the same work; move the folder of other work aside."""
    path = recipe.path / lineage.BEGUN
    begun = lineage.read_json(path)
    if folder.exists() and begun.get(stage) != read:
        previous = folder.with_name(f"{folder.name}.previous")
        if previous.exists():
            previous = folder.with_name(f"{folder.name}.previous-{int(time.time())}")
        with ExitStack() as stack:
            for lock in sorted(folder.rglob(".lock")):  # such as that of an open labelling page
                part = lock.parent.relative_to(recipe.path)
                stack.enter_context(run_dir.held(recipe, str(part)))
            folder.rename(previous)
        console.say(f"{folder}: begun with other inputs, moved to {previous}")
    folder.mkdir(parents=True, exist_ok=True)
    lineage.write_json(path, {**begun, stage: read})
