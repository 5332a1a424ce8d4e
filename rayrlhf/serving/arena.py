"""The arena: two models, drawn at random and on sides drawn at random, answer a person's prompt."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rayrlhf.config import ArenaConfig
from rayrlhf.config.label import PromptFormat
from rayrlhf.data.records import Record
from rayrlhf.serving.store import Battle


@dataclass(frozen=True)
class Reply:
    """What a model answers, or why it cannot."""

    text: str
    error: str = ""


class Silent(RuntimeError):
    """A model does not answer now; the text is for the person."""


Ask = Callable[[str, str, int], Awaitable[Reply]]
"""(model, prompt, seed) -> reply; raises Silent."""


def opening(prompt: str, form: PromptFormat) -> Record:
    """Return a person's prompt as the models read it."""
    if form == "chat":
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


async def fight(ask: Ask, cfg: ArenaConfig, key: str, prompt: str) -> Battle:
    """Let two of the models, drawn at random, answer a prompt; sides are drawn, too.

    Raises ValueError with a text for the person when a model cannot answer, Silent when it does
    not now.
    """
    left, right = secrets.SystemRandom().sample(list(cfg.models), 2)
    seeds = (secrets.randbits(62), secrets.randbits(62))
    replies = await asyncio.gather(ask(left, prompt, seeds[0]), ask(right, prompt, seeds[1]))
    for reply in replies:
        if reply.error:
            raise ValueError(reply.error)
    texts = (replies[0].text, replies[1].text)
    messages = opening(prompt, cfg.prompt_format).get("messages")
    return Battle(key, prompt, (left, right), texts, seeds, messages=messages)
