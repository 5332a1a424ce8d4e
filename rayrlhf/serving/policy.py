"""The deployments behind the endpoint: a policy on its engine, and a reward model.

Each is one replica. When it dies, Ray Serve starts it again, and it loads what is live.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ray import serve
from transformers import AutoTokenizer

from rayrlhf.config import RecipeError, ServeConfig
from rayrlhf.data.datasets import encode_prompt
from rayrlhf.data.records import Record, check
from rayrlhf.data.tokenizer import encode_text
from rayrlhf.evaluation.judges import RewardJudge
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.serving.answers import Answer, Kind
from rayrlhf.serving.engine import OpenAIEngine
from rayrlhf.serving.weights import Live, LiveWeights

LOOK_S = 0.1
MAX_BATCH = 16
"""Requests to the reward model that are scored together."""
CHARACTERS = 32
"""Of a chat for each token that a reward model reads; more cannot fit."""
TOKENS_PER_BATCH = 4096
"""Of the reward model's forward passes, padding included."""


class Policy:
    """One model that answers in OpenAI's form."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: str, cfg: ServeConfig, folder: Path, gpus: float
    ) -> None:
        """Load what `model` has live by the records in `folder`; `gpus` are this replica's."""
        live = LiveWeights(folder).of(model)
        self._engine = await OpenAIEngine.start(model, live, cfg, gpus=gpus)

    async def answer(self, kind: Kind, body: dict[str, Any]) -> Answer:
        """Answer a request that is not streamed."""
        return await self._engine.answer(kind, body)

    async def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        """Yield an Answer without a body, or the error, and then events."""
        async for item in self._engine.stream(kind, body):
            yield item

    async def load(self, live: Live, wait_s: float) -> str:
        """Replace the weights between two answers; return the version's name."""
        return await self._engine.load(live, wait_s)

    async def watch(self) -> AsyncIterator[str]:
        """Yield the version's name at once, and again when it changes, for ever.

        Raises RuntimeError when the engine is not healthy.
        """
        known = ""
        while True:
            self.check_health()
            if self._engine.version != known:
                known = self._engine.version
                yield known
            await asyncio.sleep(LOOK_S)

    async def give_up(self) -> None:
        """Let Serve start this replica again."""
        self._engine.give_up()

    def check_health(self) -> None:
        """Raise RuntimeError when Serve should start this replica again."""
        if not self._engine.is_healthy:
            raise RuntimeError("the engine is dead, or broke off while it loaded new weights")

    def __del__(self) -> None:
        self._engine.close()


class Scorer:
    """A reward model that scores responses."""

    def __init__(self, folder: str, num_threads: int, gpus: float) -> None:
        """Load a folder that `rayrlhf reward` wrote; `gpus` are this replica's.

        Without any it computes on the CPU: Ray does not hide the GPUs of others.
        """
        torch.set_num_threads(num_threads)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = ScalarHeadModel.from_pretrained(folder)
        self._room = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        self._judge = RewardJudge(
            model,
            eos_id=self._tokenizer.eos_token_id,
            tokens_per_batch=TOKENS_PER_BATCH,
            device=torch.device("cuda" if gpus else "cpu"),
        )

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.005)
    async def score(
        self, openings: list[Record], responses: list[list[str]]
    ) -> list[list[float] | str]:
        """Return the score of each response to a prompt or chat, or what is wrong with them."""
        return await asyncio.to_thread(self._score, openings, responses)

    async def watch(self) -> AsyncIterator[str]:
        """Yield a name at once, and never end."""
        yield "reward"
        await asyncio.Event().wait()

    def _score(
        self, openings: Sequence[Record], responses: Sequence[Sequence[str]]
    ) -> list[list[float] | str]:
        asked = [self._encode(*pair) for pair in zip(openings, responses, strict=True)]
        fit = [ids for each in asked if not isinstance(each, str) for ids in each]
        scores = iter(self._judge.score_ids(fit).tolist() if fit else [])
        return [each if isinstance(each, str) else [next(scores) for _ in each] for each in asked]

    def _encode(self, opening: Record, responses: Sequence[str]) -> list[list[int]] | str:
        """Return the token ids as the reward model was trained on them, or what is wrong."""
        turns = opening.get("messages", ())
        characters = sum(len(turn["content"]) for turn in turns)
        if characters > CHARACTERS * self._room:  # rendering takes time
            return (
                f"the chat has {characters} characters, and the reward model reads {self._room} "
                "tokens: shorten it"
            )
        try:
            if turns:
                check("prompt", opening, "prompt")
            before = encode_prompt(opening, self._tokenizer)
        except RecipeError as error:
            return str(error)
        end = self._tokenizer.eos_token_id
        rows = [[*before, *encode_text(self._tokenizer, text), end] for text in responses]
        longest = max(len(ids) for ids in rows)
        if longest > self._room:
            return (
                f"prompt and response have {longest} tokens, and the reward model reads "
                f"{self._room}: shorten them"
            )
        return rows
