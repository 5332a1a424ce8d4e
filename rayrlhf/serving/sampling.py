"""Completions of a policy for people to rank: K per prompt, as item records."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayrlhf import console
from rayrlhf.config import Recipe, RecipeError, SampleConfig
from rayrlhf.data import builtin
from rayrlhf.data.datasets import encode_prompts, fitting_prompts
from rayrlhf.data.records import Record, prompt_text, read_records
from rayrlhf.generation import Engine, request_seed
from rayrlhf.serving import exchange

Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]
"""(prompts as token ids, seeds) -> token ids of one response each"""
TRIES = 3
"""A prompt whose responses are not all different is asked again so often for those that lack."""


def sample_items(
    recipe: Recipe, cfg: SampleConfig, path: Path, *, key: str = "label.sample", **engine: Any
) -> int:
    """Sample `cfg.num_responses` completions of each prompt into `path`; return the prompts.

    `engine` are further settings of the engine. Raises RecipeError when the prompts cannot be read
    or none fits; it names the section `key`.
    """
    records = read_records(cfg.prompts, "prompt")
    folder = builtin.resolve(cfg.model)
    answering = Engine(
        folder,
        max_length=recipe.model.max_length,
        memory_gib=cfg.memory_gib,
        num_threads=recipe.resources.rollout.num_threads,
        **engine,
    )
    try:
        items = sample(
            records,
            partial(_generate, answering, cfg),
            AutoTokenizer.from_pretrained(folder),
            cfg,
            room=recipe.model.max_length - cfg.max_response_tokens,
            seed=recipe.seed,
        )
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from None
    del answering
    gc.collect()  # the arena's engines need the memory
    exchange.write(path, items)
    return len(items)


def _generate(
    engine: Engine, cfg: SampleConfig, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> list[list[int]]:
    done = engine.generate(
        prompts, max_tokens=cfg.max_response_tokens, temperature=cfg.temperature, seeds=seeds
    )
    return [each.token_ids for each in done]


def sample(
    records: Sequence[Record],
    generate: Generate,
    tokenizer: PreTrainedTokenizerFast,
    cfg: SampleConfig,
    *,
    room: int,
    seed: int,
) -> list[Record]:
    """Return item records of `cfg.num_prompts` prompts, in an order that the seed decides.

    Responses are different from each other and not empty; of a prompt to which the policy has
    fewer than two such answers there is no record. `room` bounds a prompt, tokens. Raises
    RecipeError when no prompt has two.
    """
    fitting = fitting_prompts(records, tokenizer, room)
    order = np.random.default_rng(seed).permutation(len(fitting))[: cfg.num_prompts]
    chosen = [fitting[i] for i in order]
    prompts = encode_prompts(chosen, tokenizer, room)
    found: list[dict[str, None]] = [{} for _ in chosen]  # distinct texts in their order
    for attempt in range(TRIES):
        places = [
            (i, k) for i, texts in enumerate(found) for k in range(cfg.num_responses - len(texts))
        ]
        if not places:
            break
        seeds = [request_seed(seed, attempt, i, k) for i, k in places]
        for (i, _), ids in zip(
            places, generate([prompts[i] for i, _ in places], seeds), strict=True
        ):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if text.strip():
                found[i].setdefault(text)
    items = [
        {**_opening(record), "responses": list(texts), "policy": cfg.model}
        for record, texts in zip(chosen, found, strict=True)
        if len(texts) > 1
    ]
    if not items:
        raise RecipeError(
            f"{cfg.model} gives the same answer to a prompt each time: raise the temperature"
        )
    fewer = sum(len(item["responses"]) < cfg.num_responses for item in items)
    left_out = len(chosen) - len(items)
    if fewer or left_out:
        console.say(
            f"label: {fewer} of {len(items)} prompts have fewer than {cfg.num_responses} different "
            f"answers; {left_out} with fewer than two are left out"
        )
    return items


def _opening(record: Record) -> Record:
    """Return what comes before the responses: for people, and for models where that is a chat."""
    chat = {"messages": record["messages"]} if "messages" in record else {}
    return {"prompt": prompt_text(record), **chat}
