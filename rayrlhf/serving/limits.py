"""What a request for tokens may ask for, read before any engine sees it."""

from collections.abc import Mapping
from typing import Any

from rayrlhf.config import ServeLimits
from rayrlhf.serving.answers import Kind
from rayrlhf.serving.refusals import Refusal

DEFAULT_COMPLETION = 16
"""Tokens of a completion that names no number, as OpenAI has it."""


def bounded(kind: Kind, body: Mapping[str, Any], limits: ServeLimits) -> dict[str, Any]:
    """Return a request's body with a number of tokens within the limit; raises Refusal (422)."""
    wanted = dict(body)
    samples = _number(wanted, "n", 1, least=1)
    if wanted.get("stream") not in (None, False, True):
        raise Refusal(422, "stream is true or false", "stream")
    if not isinstance(wanted.get("user", ""), str | None):
        raise Refusal(422, "user is a text that names who asks", "user")
    answers = samples * (_prompts(wanted.get("prompt")) if kind == "completions" else 1)
    key = "max_tokens"
    if kind == "chat" and wanted.get("max_completion_tokens") is not None:
        key = "max_completion_tokens"
    room = limits.max_tokens // answers
    if room < 1:
        raise Refusal(
            422,
            f"the request asks for {answers} answers, and this server generates at most "
            f"{limits.max_tokens} tokens per request: ask for fewer",
            "n",
        )
    if wanted.get(key) is None:
        if kind == "completions":
            wanted[key] = min(DEFAULT_COMPLETION, room)
        elif answers > 1:
            wanted[key] = room
        return wanted
    tokens = _number(wanted, key, 0, least=0)
    if tokens * answers > limits.max_tokens:
        raise Refusal(
            422,
            f"{key}={tokens}{f' for {answers} answers' if answers > 1 else ''}: this server "
            f"generates at most {limits.max_tokens} tokens per request: set it to {room} or less",
            key,
        )
    return wanted


def _number(body: Mapping[str, Any], key: str, default: int, *, least: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Refusal(422, f"{key} is a whole number from {least} on", key)
    return value


def _prompts(prompt: Any) -> int:
    """Return how many prompts a completion has: a list of texts, or of lists of token ids."""
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return len(prompt) if several else 1
