"""A model that answers people: a Ray Serve deployment around the engine of generation.py.

The engine answers one batch at a time in a thread; what people ask meanwhile forms the next one.
"""

import asyncio
from collections.abc import Sequence

from ray import serve
from transformers import AutoTokenizer

from rayrlhf.config import ArenaConfig, RecipeError
from rayrlhf.data.datasets import encode_prompt
from rayrlhf.generation import Engine
from rayrlhf.serving.arena import Reply, opening

MAX_BATCH = 16


class ArenaModel:
    """One model that answers people's prompts."""

    def __init__(self, folder: str, cfg: ArenaConfig, max_length: int, num_threads: int) -> None:
        """Load a Hugging Face folder; `max_length` bounds prompt and answer together (tokens)."""
        self._cfg, self._room = cfg, max_length - cfg.max_response_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._engine = Engine(
            folder, max_length=max_length, memory_gib=cfg.memory_gib, num_threads=num_threads
        )

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)
    async def answer(self, prompts: list[str], seeds: list[int]) -> list[Reply]:
        """Answer each prompt by itself; `seeds[i]` alone decides the random numbers of answer i."""
        return await asyncio.to_thread(self._answer, prompts, seeds)

    def _answer(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Reply]:
        encoded = [self._encode(prompt) for prompt in prompts]
        fits = {i: ids for i, ids in enumerate(encoded) if not isinstance(ids, str)}
        done = self._engine.generate(
            list(fits.values()),
            max_tokens=self._cfg.max_response_tokens,
            temperature=self._cfg.temperature,
            seeds=[seeds[i] for i in fits],
        )
        replies = {
            i: Reply(self._tokenizer.decode(each.token_ids, skip_special_tokens=True))
            for i, each in zip(fits, done, strict=True)
        }
        return [replies.get(i) or Reply("", str(wrong)) for i, wrong in enumerate(encoded)]

    def _encode(self, prompt: str) -> list[int] | str:
        """Return token ids, or what is wrong with the prompt."""
        try:
            ids = encode_prompt(opening(prompt, self._cfg.prompt_format), self._tokenizer)
        except RecipeError as error:
            return str(error)
        if 0 < len(ids) <= self._room:
            return ids
        return f"the prompt has {len(ids)} tokens, but {self._room} fit: shorten it"
