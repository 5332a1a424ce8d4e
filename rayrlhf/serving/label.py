"""`rayrlhf label`: open the page on Ray Serve, and close it with what people said as records.

1 items     read, or sampled from a policy once, into the queue
2 models    of the arena, one Serve deployment each
3 page      FastAPI behind Ray Serve; prints the URL, runs until Ctrl-C
4 records   <run>/label/comparisons.jsonl and arena.comparisons.jsonl
"""

import time
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rayrlhf import console, session
from rayrlhf.config import LabelConfig, Recipe, RecipeError, SampleConfig
from rayrlhf.data import builtin
from rayrlhf.data.records import read_records
from rayrlhf.data.tokenizer import read_tokenizer
from rayrlhf.lineage import read_json, write_json
from rayrlhf.models.folder import load_config
from rayrlhf.serving import exchange
from rayrlhf.serving.answering import MAX_BATCH, ArenaModel
from rayrlhf.serving.api import create_app
from rayrlhf.serving.arena import Ask, Reply, Silent
from rayrlhf.serving.database import Database
from rayrlhf.serving.listening import close, listen, url, wait_for_port, watch
from rayrlhf.serving.sampling import sample_items
from rayrlhf.serving.sessions import VARIABLE, load_secret
from rayrlhf.serving.store import Store

FOLDER = "label"
"""Below the run directory."""
PAGE_CPUS = 0.1


@serve.ingress()
class LabelPage:
    """The page's one replica: when it dies, Ray Serve starts it again, and nothing is lost."""

    def __init__(
        self, cfg: LabelConfig, folder: Path, secret: str, models: dict[str, DeploymentHandle]
    ) -> None:
        """`models` answer in the arena, by name; `folder` holds SQLite's file."""
        self._store = Store(Database(cfg.database, folder), claim_s=cfg.claim_s)
        self._cfg, self._secret, self._models = cfg, secret, models

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._store, self._cfg, self._secret, self._ask())

    def _ask(self) -> Ask | None:
        async def ask(model: str, prompt: str, seed: int) -> Reply:
            try:
                reply: Reply = await self._models[model].answer.remote(prompt, seed)
            except (RayError, RayServeException) as error:
                # Which model it was stays hidden from the person, and is in the replica's log.
                print(f"label: model {model} does not answer: {error!r}", flush=True)
                raise Silent(
                    f"a model does not answer now ({type(error).__name__}): ask again in a while"
                ) from error
            return reply

        return ask if self._models else None


def label(recipe: Recipe) -> Path:
    """Serve the page until Ctrl-C; return the folder with the database and the records.

    Raises RecipeError when items, models, database, secret or port are wrong, before Ray starts.
    """
    cfg = recipe.label
    assert cfg is not None, "the command line checks that the section is there"
    folder = (recipe.path / FOLDER).absolute()
    secret, made = load_secret(folder)
    models = _models(cfg)
    wait_for_port("label", cfg.host, cfg.port)
    database = Database(cfg.database, folder)
    store = Store(database, claim_s=cfg.claim_s)
    _fill_queue(recipe, cfg, store, folder)  # 1
    name = f"label-{recipe.name}"
    engine = recipe.resources.rollout
    session.connect(recipe, keeps_idle=False)
    session.require(
        [{"CPU": PAGE_CPUS}, *[{"CPU": engine.cpus, "GPU": engine.gpus}] * len(models)],
        wait_s=recipe.resources.wait_s,
        stage="label",
    )
    listen(_application(recipe, cfg, folder, secret, models), name, cfg.host, cfg.port)  # 2, 3
    _greet(cfg, folder, secret if made else None)
    try:
        watch("label", "the page", name)
    except KeyboardInterrupt:
        console.say(f"{'label':>9} closing the page")
    finally:
        close(name)
        export(store, folder)  # 4
        database.close()
    return folder


def export(store: Store, folder: Path) -> None:
    """Write what people said so far as comparison records, and say how much that is."""
    ranked, voted = exchange.ranked_records(store), exchange.voted_records(store)
    for file, records in ((exchange.FILE, ranked), (f"arena.{exchange.FILE}", voted)):
        if records:
            exchange.write(folder / file, records)
            console.say(f"{'label':>9} {len(records)} comparisons in {folder / file}")
    if not ranked and not voted:
        console.say(f"{'label':>9} nobody has judged anything yet")


def _models(cfg: LabelConfig) -> dict[str, str]:
    """Return name and folder (or hub name) of the arena's models; raises RecipeError."""
    found: dict[str, str] = {}
    if cfg.arena is None:
        return found
    for name, path in cfg.arena.models.items():
        folder = builtin.resolve(path)
        try:
            load_config(folder)
            tokenizer = read_tokenizer(folder, fix="put the tokenizer of the model into its folder")
        except RecipeError as error:
            raise RecipeError(f"label.arena.models.{name}: {error}") from None
        if cfg.arena.prompt_format == "chat" and not tokenizer.chat_template:
            raise RecipeError(
                f"label.arena.models.{name}: the tokenizer of {folder} has no chat template: set "
                "label.arena.prompt_format=text, or name a model that was trained on chats"
            )
        # Its replica runs in another folder.
        found[name] = str(Path(folder).absolute()) if Path(folder).is_dir() else folder
    return found


def _fill_queue(recipe: Recipe, cfg: LabelConfig, store: Store, folder: Path) -> None:
    if not cfg.ranks:
        return
    path = cfg.items
    if cfg.sample is not None:
        path = str(_sampled(recipe, cfg.sample, folder))
    assert path is not None, "LabelConfig.ranks says that there are items"
    records = read_records(path, "item")
    number = store.set_items(records, exchange.wanted_people(len(records), cfg))
    same = f", {len(records) - number} of {len(records)} in {path} twice" * (number < len(records))
    progress = store.progress()
    console.say(
        f"{'label':>9} {number} items{same}; {progress.done} of {progress.wanted} rankings are done"
    )


def _sampled(recipe: Recipe, cfg: SampleConfig, folder: Path) -> Path:
    """Return the file of completions; those of other settings are moved aside.

    What people said of the latter stays in the database.
    """
    path, settings_path = folder / "items.jsonl", folder / "items.settings.json"
    settings = cfg.model_dump(mode="json", exclude={"memory_gib"})
    settings |= {"seed": recipe.seed, "max_length": recipe.model.max_length}
    if path.is_file() and settings_path.is_file():
        before = read_json(settings_path)
        changed = [key for key in settings if settings[key] != before.get(key)]
        if changed:
            kept = folder / f"items.previous-{int(time.time())}.jsonl"
            path.rename(kept)
            console.say(f"{'label':>9} other {', '.join(changed)}: {path} moved to {kept}")
    if not path.is_file():
        console.say(f"{'label':>9} sampling from {cfg.model} into {path}")
        settings_path.unlink(missing_ok=True)  # those of a sample that is not there yet
        sample_items(recipe, cfg, path)
    if not settings_path.is_file():
        write_json(settings_path, settings)
    return path


def _application(
    recipe: Recipe, cfg: LabelConfig, folder: Path, secret: str, models: dict[str, str]
) -> serve.Application:
    """Bind the page to its models; it runs on this node, where its files are."""
    here = f"node:{ray.util.get_node_ip_address()}"
    handles: dict[str, Any] = {}
    engine, max_length = recipe.resources.rollout, recipe.model.max_length
    for name, path in models.items():
        deployment = serve.deployment(
            ArenaModel,
            name=f"model-{name}",
            max_ongoing_requests=4 * MAX_BATCH,
            ray_actor_options={"num_cpus": engine.cpus, "num_gpus": engine.gpus},
        )
        handles[name] = deployment.bind(path, cfg.arena, max_length, engine.num_threads)
    page = serve.deployment(
        LabelPage,
        num_replicas=1,
        max_ongoing_requests=200,
        ray_actor_options={"num_cpus": PAGE_CPUS, "resources": {here: 0.001}},
    )
    return page.bind(cfg, folder, secret, handles)


def _greet(cfg: LabelConfig, folder: Path, made: str | None) -> None:
    console.say(f"{'label':>9} {url(cfg.host, cfg.port)}/  sign in as {', '.join(cfg.labellers)}")
    if made is not None:
        console.say(f"{'label':>9} secret for all of them, shown this once: {made}")
    else:
        console.say(f"{'label':>9} secret: that of {VARIABLE}, or the one in {folder / 'secret'}")
    console.say(f"{'label':>9} Ctrl-C closes the page and writes the comparisons")
