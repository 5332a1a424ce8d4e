"""The endpoint: which models answer, who may ask, and how much one request may cost."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.section import Positive, PositiveFloat, Section

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
FollowedStage = Literal["pretrain", "sft", "dpo", "ppo"]


class ServedModel(Section):
    """One of the models that answer."""

    path: str
    """Folder, hub name or `builtin:` name."""
    share: PositiveFloat = 1.0
    """Weight of this model where a request names none of them: share / sum of all shares."""


class ServeLimits(Section):
    """What one request, and all of them together, may ask for."""

    max_body_bytes: Positive = 1_000_000
    """Of a request's body, bytes; more is refused with 413."""
    max_concurrent: Positive = 128
    """Requests that are being answered at a time; more are refused with 429."""
    max_tokens: Positive = 1024
    """Tokens that one request may have generated: `max_tokens` times `n` times its prompts. More is
    refused with 422; a request that says nothing gets what is left of it."""
    max_responses: Positive = 64
    """Responses that one request to /v1/score may hold; more are refused with 422."""
    timeout_s: PositiveFloat = 120
    """Seconds after which a request ends with 504; new weights wait this long for old answers."""


class ServeConfig(Section):
    """An OpenAI-compatible endpoint on Ray Serve."""

    models: dict[str, ServedModel] = {}
    """Name -> model. A request names one of them, or the recipe's name: then the shares decide."""
    follow: FollowedStage | None = None
    """A stage of this run, served under its name: each new checkpoint, and its final model, goes
    live when it is whole."""
    follow_share: PositiveFloat = 1.0
    """Its share beside `models`."""
    reward: str | None = None
    """Folder of a reward model, which then scores at /v1/score."""
    replicas: Positive = 1
    """Engines per model; each gets what `resources.rollout` says of one engine."""
    max_length: Positive | None = None
    """Tokens of prompt and answer together; None takes what the model was made for."""
    memory_gib: PositiveFloat = 1.0
    """KV cache of each engine on CPU, GiB."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Part of a GPU that weights and KV cache of an engine take (vLLM's default)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the engines compute in. `auto`: float32 on CPUs, where it is the faster one, and on GPUs
    what config.json says, bfloat16 for float32."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine reach `0.0.0.0`: put a proxy with TLS before
    it, since the token travels as it is."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    token_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] = "RAYRLHF_SERVE_TOKEN"
    """Environment variable that holds the bearer token. Without it one is made, once, and kept in
    serve/token."""
    limits: ServeLimits = ServeLimits()
    votes: bool = False
    """Whether users may say, at /v1/votes, which of two answers to one prompt is better. What they
    say goes where the labelling page keeps its votes."""
    max_votable: Positive = 10_000
    """Answers that are kept in memory for votes, the newest ones."""

    @field_validator("models")
    @classmethod
    def _have_names(cls, models: dict[str, ServedModel]) -> dict[str, ServedModel]:
        for name in models:
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(
                    f"serve.models has {name!r}: a name is up to 40 letters, digits and ._-, and "
                    "begins with a letter or digit: change it"
                )
        return models

    @model_validator(mode="after")
    def _serves_something(self) -> Self:
        if not self.models and self.follow is None:
            raise ValueError(
                "serve has no model: set serve.models, for example {ppo: {path: "
                "runs/x/ppo/final}}, or serve.follow to a stage of this run"
            )
        if self.follow in self.models:
            raise ValueError(
                f"serve.follow={self.follow} and serve.models.{self.follow} have the same name: "
                "rename the model"
            )
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Share of the requests that name no model, per model; they sum to 1."""
        weights = {name: model.share for name, model in self.models.items()}
        if self.follow is not None:
            weights[self.follow] = self.follow_share
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def check_names(self, recipe_name: str) -> None:
        """Raise ValueError when a model among several has the name that stands for all of them."""
        if recipe_name in self.shares and len(self.shares) > 1:
            raise ValueError(
                f"serve.models.{recipe_name} has the recipe's name, by which a request leaves the "
                "choice to the shares: rename the model"
            )
