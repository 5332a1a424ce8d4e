"""`rayrlhf serve`: the endpoint on Ray Serve, until Ctrl-C.

    proxy -> front (FastAPI: token, limits, A/B, votes) -> a policy per engine (vLLM)
                                                        -> the reward model

`application` builds it from a recipe; `rayrlhf.serving.openai:app` does the same for a cluster's
own Serve, such as KubeRay's RayService.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from transformers import PreTrainedConfig

from rayrlhf import console, session
from rayrlhf.config import Recipe, RecipeError
from rayrlhf.data import builtin
from rayrlhf.models.folder import load_config
from rayrlhf.serving.front import (
    FOLDER,
    VOTES,
    Front,
    folder_of,
    followed_folder,
    section_of,
    store_of,
)
from rayrlhf.serving.label import export
from rayrlhf.serving.listening import close, listen, url, wait_for_port, watch
from rayrlhf.serving.policy import Policy, Scorer
from rayrlhf.serving.sessions import load_secret
from rayrlhf.serving.weights import LiveWeights, newest, tensor_shapes

TOKEN = "token"
"""In the folder of the endpoint."""
FRONT_CPUS = 0.1
HEALTH_S = 2.0
"""Seconds between two looks of Serve at an engine."""
FRONT_STOPS = {"graceful_shutdown_timeout_s": 5.0, "graceful_shutdown_wait_loop_s": 0.5}
MODEL_STOPS = {"graceful_shutdown_timeout_s": 1.0, "graceful_shutdown_wait_loop_s": 0.5}
"""Where Serve ends as a whole, the front goes first, when its answers are done: what a model has
left is a call that watches."""
MARGIN = 64
"""Requests beyond the limit that reach the front, to be refused there instead of queueing."""


def serve_models(recipe: Recipe) -> Path:
    """Serve until Ctrl-C; return the folder with the token and what is live.

    Raises RecipeError when a model, the token or the port is wrong, before Ray starts.
    """
    cfg = section_of(recipe)
    folders = model_folders(recipe)
    folder = folder_of(recipe)
    token, made = load_secret(folder, cfg.token_variable, TOKEN)
    wait_for_port(FOLDER, cfg.host, cfg.port)
    name = f"serve-{recipe.name}"
    session.connect(recipe, keeps_idle=False)
    engine = recipe.resources.rollout
    scorers = [_scorer_bundle(recipe)] if cfg.reward is not None else []
    engines = [{"CPU": engine.cpus, "GPU": engine.gpus}] * (len(folders) * cfg.replicas)
    session.require(
        [{"CPU": FRONT_CPUS}, *engines, *scorers],
        wait_s=recipe.resources.wait_s,
        stage="serve",
    )
    console.say(f"{'serve':>9} starting {', '.join(folders)}")
    try:
        listen(application(recipe, folders, token, is_here=True), name, cfg.host, cfg.port)
        _greet(recipe, token if made else None)
        watch("serve", "the endpoint", name)
    except KeyboardInterrupt:
        console.say(f"{'serve':>9} closing the endpoint")
    finally:
        if cfg.votes:  # a job that is stopped has seconds, and closing may take them
            export(store_of(recipe), recipe.path / VOTES)
        close(name)
    return folder


def application(
    recipe: Recipe, folders: Mapping[str, str], token: str, *, is_here: bool
) -> serve.Application:
    """Bind the front to engines that load `folders`; `is_here` keeps it on this node."""
    cfg, folder = section_of(recipe), folder_of(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    LiveWeights(folder).start(folders, [cfg.follow] if cfg.follow is not None else [])
    engine = recipe.resources.rollout
    stops = MODEL_STOPS if is_here and session.is_local() else FRONT_STOPS
    environment = {"OMP_NUM_THREADS": str(engine.num_threads)}
    policies: dict[str, list[Any]] = {}
    for model in folders:
        for number in range(cfg.replicas):
            deployment = serve.deployment(
                Policy,
                name=f"{model}-{number}",
                max_ongoing_requests=cfg.limits.max_concurrent + MARGIN,
                health_check_period_s=HEALTH_S,
                **stops,
                ray_actor_options={
                    "num_cpus": engine.cpus,
                    "num_gpus": engine.gpus,
                    "runtime_env": {"env_vars": environment},
                },
            )
            bound = deployment.bind(model, cfg, folder, engine.gpus)
            policies.setdefault(model, []).append(bound)
    front = serve.deployment(
        Front,
        max_ongoing_requests=4 * cfg.limits.max_concurrent + MARGIN,
        **FRONT_STOPS,
        ray_actor_options={
            "num_cpus": FRONT_CPUS,
            "resources": {f"node:{ray.util.get_node_ip_address()}": 0.001} if is_here else {},
        },
    )
    return front.bind(recipe, token, policies, _scorer(recipe, stops))


def model_folders(recipe: Recipe) -> dict[str, str]:
    """Return the folder that each served model starts with; raises RecipeError without one."""
    cfg = section_of(recipe)
    found = {}
    for name, model in cfg.models.items():
        key = f"serve.models.{name}.path"
        found[name] = _checked(key, builtin.resolve(model.path), cfg.max_length)
    followed = followed_folder(recipe)
    if followed is not None:
        assert cfg.follow is not None, "only a stage that is named has a folder"
        begun = newest(followed)
        if begun is None:
            raise RecipeError(
                f"serve.follow={cfg.follow}: {followed} has no whole checkpoint and no final model "
                f"yet: start after the first one, or run rayrlhf {cfg.follow}"
            )
        found[cfg.follow] = _checked("serve.follow", str(begun.absolute()), cfg.max_length)
    if cfg.reward is not None:
        _checked("serve.reward", builtin.resolve(cfg.reward))
    return found


def _checked(key: str, folder: str, max_length: int | None = None) -> str:
    """Return a model's place as a whole path; raises RecipeError, which names `key`.

    `max_length` is what it has to read, in tokens; None where that is its own affair.
    """
    try:
        room = _room(load_config(folder))
        place = Path(folder)
        if place.is_dir():
            tensor_shapes(place)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from None
    if max_length is not None and room is not None and max_length > room:
        raise RecipeError(
            f"serve.max_length={max_length}: {key}={folder} reads {room} tokens: set "
            f"serve.max_length to {room} or less, or leave it out"
        )
    if place.is_dir():
        return str(place.absolute())
    from huggingface_hub import snapshot_download

    try:
        # Engines, and weights that take the place of these, are compared by files.
        return snapshot_download(folder, allow_patterns=["*.safetensors", "*.json", "*.jinja"])
    except (OSError, ValueError) as error:
        raise RecipeError(f"{key}={folder}: {str(error).splitlines()[0]}") from None


def _room(config: PreTrainedConfig) -> int | None:
    """Return the tokens that a model reads; None where vLLM may read more than its positions."""
    ropes = (getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    if any("factor" in rope for rope in ropes) or hasattr(config, "model_max_length"):
        return None
    return getattr(config, "max_position_embeddings", None)  # GPT-2's n_positions, too


def _scorer_bundle(recipe: Recipe) -> dict[str, float]:
    own = recipe.resources.reward
    return {"CPU": own.cpus, "GPU": own.gpus}


def _scorer(recipe: Recipe, stops: Mapping[str, float]) -> serve.Application | None:
    reward = section_of(recipe).reward
    if reward is None:
        return None
    own = recipe.resources.reward
    deployment = serve.deployment(
        Scorer,
        name="reward",
        max_ongoing_requests=section_of(recipe).limits.max_concurrent + MARGIN,
        **stops,
        ray_actor_options={"num_cpus": own.cpus, "num_gpus": own.gpus},
    )
    folder = _checked("serve.reward", builtin.resolve(reward))
    return deployment.bind(folder, own.num_threads, own.gpus)


def _greet(recipe: Recipe, made: str | None) -> None:
    cfg = section_of(recipe)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in cfg.shares.items())
    console.say(
        f"{'serve':>9} {url(cfg.host, cfg.port)}/v1  model {recipe.name}"
        f"{f' ({shares})' if len(cfg.shares) > 1 else ''}"
    )
    if made is not None:
        console.say(f"{'serve':>9} token, shown this once: {made}")
    else:
        console.say(
            f"{'serve':>9} token: that of {cfg.token_variable}, or the one in "
            f"{folder_of(recipe) / TOKEN}"
        )
    console.say(f"{'serve':>9} Ctrl-C closes the endpoint")
