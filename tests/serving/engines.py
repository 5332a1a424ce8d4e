"""Engines and reward models that answer at once, and an endpoint around them, without Ray."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rayrlhf.config import ServeConfig
from rayrlhf.data.records import Record
from rayrlhf.serving.answers import Answer, Kind
from rayrlhf.serving.frontend import Frontend
from rayrlhf.serving.refusals import Refusal
from rayrlhf.serving.votes import Votes
from rayrlhf.serving.weights import Live, LiveWeights

TOKEN = "correct horse battery"
ASK = {"model": "toy", "messages": [{"role": "user", "content": "hello"}]}


def save_model(folder: Path, *, value: float = 0.0, **config: Any) -> Path:
    """Write what the front looks at in a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"architectures": ["LlamaForCausalLM"], **config}
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_file({"weight": torch.full((2, 3), value)}, str(folder / "model.safetensors"))
    return folder


class FakeEngine:
    """Says its version; `wait_s` and `fails` as it is told."""

    def __init__(self, model: str, *, wait_s: float = 0.0) -> None:
        self.model, self.wait_s = model, wait_s
        self.version, self.ongoing = f"{model}-v1-00000000", 0
        self.asked: list[dict[str, Any]] = []
        self.was_cancelled = False
        self.load_error: BaseException | None = None
        self.loaded: list[Live] = []
        self.restarts = 0
        self.stream_error = ""

    async def answer(self, kind: Kind, body: dict[str, Any]) -> Answer:
        self.asked.append(body)
        version = self.version
        await self._work()
        place = {"message": {"role": "assistant", "content": version}}
        choice = place if kind == "chat" else {"text": version}
        tree = {
            "id": f"{kind}-{self.model}-{len(self.asked)}",
            "choices": [{"index": 0, **choice}],
            "system_fingerprint": version,
        }
        return Answer(200, json.dumps(tree).encode(), version)

    async def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        self.asked.append(body)
        yield Answer(200, b"", self.version)
        for word in ("one ", "two"):
            await self._work()
            place = {"delta": {"content": word}} if kind == "chat" else {"text": word}
            tree = {"id": f"{kind}-s{len(self.asked)}", "choices": [{"index": 0, **place}]}
            yield f"data: {json.dumps(tree)}\n\n"
        if self.stream_error:  # as vLLM has it
            yield f"data: {json.dumps({'error': {'message': self.stream_error}})}\n\n"
        yield "data: [DONE]\n\n"

    async def _work(self) -> None:
        if not self.version:
            raise Refusal(503, "the model went down")
        try:
            await asyncio.sleep(self.wait_s)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise

    async def load(self, live: Live, wait_s: float) -> str:
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append(live)
        self.version = live.fingerprint(self.model)
        return self.version

    async def restart(self) -> None:
        self.restarts += 1

    async def watch(self) -> None:
        await asyncio.Event().wait()


class FakeScorer:
    """Scores a response by its length; refuses long ones."""

    def __init__(self) -> None:
        self.asked: list[Record] = []

    async def score(self, opening: Record, responses: list[str]) -> list[float] | str:
        self.asked.append(opening)
        if any(len(text) > 1000 for text in responses):
            return "prompt and response have too many tokens: shorten them"
        return [float(len(text)) for text in responses]

    async def watch(self) -> None:
        await asyncio.Event().wait()


def endpoint(folder: Path, *, votes: Votes | None = None, **serve: Any) -> Frontend:
    """Return a front named toy; its models are those of `serve`, or one called a."""
    tree = {"models": {"a": {"path": "a"}}, **serve}
    cfg = ServeConfig.model_validate(tree)
    weights = LiveWeights(folder / "serve")
    weights.start({name: str(save_model(folder / name)) for name in cfg.shares})
    return Frontend(
        name="toy",
        cfg=cfg,
        engines={name: [FakeEngine(name) for _ in range(cfg.replicas)] for name in cfg.shares},
        weights=weights,
        scorer=FakeScorer(),
        votes=votes,
    )
