"""The replica that requests come to; it computes nothing, and loads neither torch nor vLLM."""

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from rayrlhf.config import Recipe, ServeConfig
from rayrlhf.serving.database import Database
from rayrlhf.serving.endpoint import create_app
from rayrlhf.serving.frontend import Frontend
from rayrlhf.serving.store import Store
from rayrlhf.serving.upstream import ServeScorer, ServeUpstream
from rayrlhf.serving.votes import Votes
from rayrlhf.serving.weights import LiveWeights

FOLDER = "serve"
"""In the run directory."""
VOTES = "label"
"""In the run directory: where the labelling page keeps what people said."""


@serve.ingress()
class Front:
    """The one replica that requests come to: when it dies, Ray Serve starts it again."""

    def __init__(
        self,
        recipe: Recipe,
        token: str,
        policies: Mapping[str, list[DeploymentHandle]],
        scorer: DeploymentHandle | None,
    ) -> None:
        """`policies` are the engines of each model."""
        self._recipe, self._token = recipe, token
        self._policies, self._scorer = policies, scorer
        self._frontend: Frontend | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        recipe, cfg = self._recipe, section_of(self._recipe)
        votes = Votes(store_of(recipe), cfg.max_votable) if cfg.votes else None
        self._frontend = Frontend(
            name=recipe.name,
            cfg=cfg,
            engines={
                model: [ServeUpstream(handle) for handle in handles]
                for model, handles in self._policies.items()
            },
            weights=LiveWeights(folder_of(recipe)),
            scorer=ServeScorer(self._scorer) if self._scorer is not None else None,
            votes=votes,
            followed=followed_folder(recipe),
        )
        return create_app(self._frontend, self._token)

    def check_health(self) -> None:
        """Raise RuntimeError when Serve should start this replica again."""
        if self._frontend is not None:
            self._frontend.check()


def section_of(recipe: Recipe) -> ServeConfig:
    """Return the section; the command line checks that it is there."""
    assert recipe.serve is not None, "the command line checks that the section is there"
    return recipe.serve


def folder_of(recipe: Recipe) -> Path:
    """Return where the endpoint keeps its token and what is live, as a whole path."""
    return (recipe.path / FOLDER).absolute()


def followed_folder(recipe: Recipe) -> Path | None:
    """Return the folder of the stage that is followed; None where none is."""
    stage = section_of(recipe).follow
    return None if stage is None else (recipe.path / stage).absolute()


def store_of(recipe: Recipe) -> Store:
    """Open the store of the labelling page of this run."""
    folder = recipe.path / VOTES
    folder.mkdir(parents=True, exist_ok=True)
    url = recipe.label.database if recipe.label is not None else ""
    return Store(Database(url, folder), claim_s=1)
