"""What passes between the front and the engines."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["chat", "completions"]
"""Which of OpenAI's two requests for tokens."""


@dataclass(frozen=True)
class Answer:
    """What the engine says to a request, and of which version it is."""

    status: int
    body: bytes
    """JSON, in OpenAI's form; empty where a stream follows."""
    version: str
