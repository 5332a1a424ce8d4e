"""The endpoint over HTTP, as a FastAPI application that needs no Ray.

    POST /v1/chat/completions, /v1/completions   OpenAI's, streamed or not; answered by vLLM
    GET  /v1/models, /v1/models/{model}          OpenAI's
    POST /v1/score {prompt, responses}           scores of the reward model
    POST /v1/votes {completions, winner, user}   which of two answers is better, where that is on
    POST /admin/weights {folder, model}          new weights; GET: what is live
    GET  /healthz, /metrics                      200 while an engine of each model is up; Prometheus

Every error has OpenAI's form. An answer names its model and version in headers.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from rayrlhf.data.records import Record
from rayrlhf.serving.answers import Kind
from rayrlhf.serving.door import Door
from rayrlhf.serving.frontend import Frontend, Reloaded
from rayrlhf.serving.limits import bounded
from rayrlhf.serving.refusals import Refusal

Name = Annotated[str, Field(min_length=1, max_length=200)]
ERROR = {
    "description": "An error in OpenAI's form",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                    }
                },
            }
        }
    },
}


class Body(BaseModel):
    """A request's JSON object; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Message(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class ScoreBody(Body):
    """Responses to score."""

    prompt: str | Annotated[list[Message], Field(min_length=1, max_length=128)]
    """What comes before each of them: a text, or a chat that goes through the chat template."""
    responses: Annotated[list[str], Field(min_length=1)]


class Scores(BaseModel):
    """One score per response, in their order; 0 is the mean score of the demonstrations."""

    model: str
    scores: list[float]


class VoteBody(Body):
    """Which of two answers to one prompt is better."""

    completions: Annotated[list[Name], Field(min_length=2, max_length=2)]
    """Ids of the two answers."""
    winner: Name | None
    """One of them; null: neither is better."""
    user: Name | None = None
    """Who says so; each user has one vote on two answers."""


class Voted(BaseModel):
    """A vote is counted."""

    saved: bool
    counted_before: bool


class WeightsBody(Body):
    """New weights for a model."""

    folder: Annotated[str, Field(min_length=1, max_length=4096)]
    """On the server: a Hugging Face folder with safetensors, of the served architecture."""
    model: Name | None = None
    """None: the first one of the recipe."""


class Weights(BaseModel):
    """What a model has live."""

    model: str
    version: int
    fingerprint: str


def create_app(frontend: Frontend, token: str) -> FastAPI:
    """Return the application; it watches the engines for as long as it runs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        frontend.start()
        yield
        await frontend.stop()

    app = FastAPI(
        title="rayrlhf serve",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"4XX": ERROR, "5XX": ERROR},
    )
    app.add_middleware(Door, token=token, limits=frontend.cfg.limits, meters=frontend.meters)
    _put_errors_into_form(app)
    _add_openai(app, frontend)
    _add_own(app, frontend)
    _add_weights(app, frontend)
    return app


def _put_errors_into_form(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, str(error.detail)).response(error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # Of what fits none of several forms, the one that fits furthest.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"{place}: {first['msg']}" if place else str(first["msg"])
        return Refusal(422, text, place or None).response()

    @app.exception_handler(SQLAlchemyError)
    async def unavailable(_: Request, error: SQLAlchemyError) -> Response:
        # The replica's log has the reason, and clients try again what is a 503.
        print(f"serve: the database of votes refused: {error}"[:500], flush=True)
        return Refusal(503, "the database of votes does not answer: send it again").response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # The replica's log has the traceback, which Starlette goes on to raise.
        return Refusal(500, f"the server failed: {type(error).__name__}").response()


def _add_openai(app: FastAPI, frontend: Frontend) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete(frontend, "chat", request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _complete(frontend, "completions", request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(name) for name in frontend.models]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        if model not in frontend.models:
            raise Refusal(404, f"there is no model {model[:80]!r}", "model")
        return _card(model)


async def _complete(frontend: Frontend, kind: Kind, request: Request) -> Response:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refusal(422, "the body is not JSON: send an object") from None
    if not isinstance(body, dict):
        raise Refusal(422, "the body is no JSON object: send one with model and messages or prompt")
    asked = bounded(kind, body, frontend.cfg.limits)
    if not asked.get("stream"):
        answer, headers = await frontend.answer(kind, asked)
        return Response(answer.body, answer.status, headers, media_type="application/json")
    first, headers, events = await frontend.stream(kind, asked)
    if first.status != 200:
        return Response(first.body, first.status, headers, media_type="application/json")
    return StreamingResponse(events, 200, headers, media_type="text/event-stream")


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rayrlhf"}


def _add_own(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        for model in frontend.engines:
            frontend.engine(model)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(frontend.meters.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/score")
    async def score(body: ScoreBody) -> Scores:
        most = frontend.cfg.limits.max_responses
        if len(body.responses) > most:
            raise Refusal(
                422, f"{len(body.responses)} responses, and {most} is the limit", "responses"
            )
        if frontend.scorer is None:
            raise Refusal(404, "no reward model is served: set serve.reward in the recipe")
        opening: Record = {"prompt": body.prompt}
        if not isinstance(body.prompt, str):
            opening = {"messages": [turn.model_dump() for turn in body.prompt]}
        scores = await frontend.scorer.score(opening, body.responses)
        if isinstance(scores, str):
            raise Refusal(422, scores, "responses" if isinstance(body.prompt, str) else "prompt")
        return Scores(model="reward", scores=scores)

    @app.post("/v1/votes")
    async def vote(body: VoteBody) -> Voted:
        if frontend.votes is None:
            raise Refusal(404, "votes are off: set serve.votes=true in the recipe")
        pair = (body.completions[0], body.completions[1])
        fresh = await asyncio.to_thread(frontend.votes.vote, pair, body.winner, body.user)
        return Voted(saved=True, counted_before=not fresh)


def _add_weights(app: FastAPI, frontend: Frontend) -> None:
    loading: set[asyncio.Task[Reloaded]] = set()

    @app.post("/admin/weights")
    async def load(body: WeightsBody) -> Weights:
        # Who hangs up does not leave an engine with half of its weights.
        task = asyncio.create_task(frontend.load(body.model, body.folder))
        loading.add(task)
        task.add_done_callback(loading.discard)
        done = await asyncio.shield(task)
        return Weights(model=done.model, version=done.version, fingerprint=done.fingerprint)

    @app.get("/admin/weights")
    async def live() -> list[Weights]:
        found = []
        for model in frontend.engines:
            now = frontend.weights.of(model)
            found.append(
                Weights(model=model, version=now.version, fingerprint=now.fingerprint(model))
            )
        return found
