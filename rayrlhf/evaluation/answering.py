"""Answers of one model after another to prompts, by one engine that takes new weights."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import EvaluateConfig, Recipe
from rayrlhf.evaluation.judges import Answer
from rayrlhf.generation import Engine
from rayrlhf.models.causal_lm import CausalLMModel, named_weights

_ANSWERS = 1
"""Stream of the random numbers of one answer to each prompt."""


class Prompt(NamedTuple):
    """What a model is asked."""

    text: str
    """As people read it."""
    ids: list[int]
    is_chat: bool = False


class Answerer:
    """Loads a model, and lets it answer; models of the same shapes share an engine."""

    def __init__(
        self,
        build: Callable[..., Engine],
        tokenizer: PreTrainedTokenizerFast,
        recipe: Recipe,
        cfg: EvaluateConfig,
    ) -> None:
        """`build` makes the engine; nothing is loaded yet."""
        self._build, self._tokenizer = build, tokenizer
        self._recipe, self._cfg = recipe, cfg
        self._engine: Engine | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._folder = ""
        self._version = 0

    def load(self, folder: str) -> None:
        """Make the model in `folder` (or of that hub name) the one that answers."""
        if folder == self._folder:
            return
        weights = dict(named_weights(CausalLMModel.from_pretrained(folder)))
        shapes = {key: tensor.shape for key, tensor in weights.items()}
        if self._engine is not None and shapes == self._shapes:
            self._version += 1
            self._engine.load_weights(weights.items(), self._version)
        else:
            self.release()  # the engine before must leave its memory first
            self._engine = self._build(
                folder,
                max_length=self._recipe.model.max_length,
                memory_gib=self._cfg.memory_gib,
                seed=self._recipe.seed,
                num_threads=self._recipe.resources.rollout.num_threads,
                eos_token_id=self._tokenizer.eos_token_id,
            )
        self._folder, self._shapes = folder, shapes

    def release(self) -> None:
        """Give back the engine's memory, most of a GPU's, to models that are run without it."""
        self._engine, self._folder = None, ""
        gc.collect()

    def answer(self, prompts: Sequence[Prompt], *, seeds: Sequence[int]) -> list[Answer]:
        """Sample an answer to each prompt; `seeds[i]` alone decides the i-th one's randomness."""
        assert self._engine is not None, "load a model first"
        completions = self._engine.generate(
            [prompt.ids for prompt in prompts],
            seeds=seeds,
            max_tokens=self._cfg.max_response_tokens,
            temperature=self._cfg.temperature,
        )
        return [
            Answer(
                prompt.text,
                self._tokenizer.decode(done.token_ids, skip_special_tokens=True),
                prompt.ids,
                done.token_ids,
                done.log_probs,
                done.finish_reason == "stop",
                prompt.is_chat,
            )
            for prompt, done in zip(prompts, completions, strict=True)
        ]

    def answer_often(
        self, prompts: Sequence[Prompt], num_samples: int, *, stream: int
    ) -> list[list[Answer]]:
        """Sample `num_samples` answers to each prompt; `stream` tells uses of one seed apart."""
        seeds = answer_seeds(self._recipe.seed, stream, len(prompts) * num_samples)
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        given = self.answer(repeated, seeds=seeds)
        return [given[start : start + num_samples] for start in range(0, len(given), num_samples)]


def answer_prompts(
    answerer: Answerer, models: Mapping[str, str], prompts: Sequence[Prompt], *, seed: int
) -> Iterator[tuple[str, list[Answer]]]:
    """Yield each model's name and its answers, one per prompt, while it is the one loaded.

    Every model has the same random seed for a prompt.
    """
    seeds = answer_seeds(seed, _ANSWERS, len(prompts))
    for name, folder in models.items():
        answerer.load(folder)
        yield name, answerer.answer(prompts, seeds=seeds)


def answer_seeds(seed: int, stream: int, num: int) -> list[int]:
    """Return `num` seeds of answers: the same for every model."""
    rng = np.random.default_rng([seed, stream])
    return [int(drawn) for drawn in rng.integers(0, 2**31, size=num)]
