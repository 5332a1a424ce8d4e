"""Votes of users between two answers to one prompt, kept where the labelling page keeps its own.

Answers are kept in memory for as long as users may vote on them, the newest first to stay. What is
voted on is one answer to a prompt or a chat: what a comparison record can hold. One that was broken
off is not, nor one that repeats its prompt or read more than the messages.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayrlhf.config import RecipeError
from rayrlhf.config.label import LABELLER
from rayrlhf.data.records import Record, check, prompt_text
from rayrlhf.serving.answers import Kind
from rayrlhf.serving.refusals import Refusal
from rayrlhf.serving.store import Battle, Conflict, Store

NOBODY = "api"
"""Stands for a user that a vote does not name."""
READ_BESIDE = (
    *("tools", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort"),
    "continue_final_message",
)
"""Fields of a chat's request that change what the model reads."""


@dataclass(frozen=True)
class Kept:
    """An answer that may be voted on."""

    opening: Record
    """`prompt`, or `messages`."""
    response: str
    version: str


class Votes:
    """Keeps answers, and counts votes on two of them."""

    def __init__(self, store: Store, max_votable: int) -> None:
        """`max_votable` is the number of answers that are kept."""
        self._store, self._max = store, max_votable
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(self, kind: Kind, body: Mapping[str, Any], answer: bytes, version: str) -> None:
        """Keep an answer, JSON in OpenAI's form, unless nobody could vote on it."""
        tree = json.loads(answer)
        found = tree["choices"][0]
        text = found["message"]["content"] if kind == "chat" else found["text"]
        self._keep(kind, body, tree["id"], text, len(tree["choices"]), version)

    def reader(self, kind: Kind, body: Mapping[str, Any], version: str) -> "StreamReader":
        """Return what keeps a streamed answer as it passes."""
        return StreamReader(self, kind, body, version)

    def _keep(
        self,
        kind: Kind,
        body: Mapping[str, Any],
        name: str,
        text: str | None,
        choices: int,
        version: str,
    ) -> None:
        opening = opening_of(kind, body)
        if opening is None or not text or choices != 1:
            return
        self._kept[name] = Kept(opening, text, version)
        while len(self._kept) > self._max:
            self._kept.popitem(last=False)

    def vote(self, names: tuple[str, str], winner: str | None, user: str | None) -> bool:
        """Count a vote; return False when the very same vote was counted before.

        `winner` is one of `names`, None a tie. Raises Refusal when there is no such pair of
        answers, or another vote of this user on it.
        """
        if names[0] == names[1]:
            raise Refusal(422, "completions names one answer twice: name two", "completions")
        if winner is not None and winner not in names:
            raise Refusal(422, "winner is one of the two completions, or null for a tie", "winner")
        left, right = sorted(names)
        answers = [self._answer(name) for name in (left, right)]
        opening = answers[0].opening
        if opening != answers[1].opening:
            raise Refusal(422, "the two completions answer different prompts", "completions")
        voter = _labeller(user)
        key = hashlib.sha256(f"{left}\n{right}".encode()).hexdigest()
        battle = Battle(
            key,
            prompt_text(opening),
            (answers[0].version, answers[1].version),
            (answers[0].response, answers[1].response),
            (0, 0),
            messages=opening.get("messages"),
        )
        self._store.add_battle(voter, battle)
        said = "tie" if winner is None else "ab"[(left, right).index(winner)]
        try:
            return self._store.vote(voter, key, said, key)[1]
        except Conflict as error:
            raise Refusal(409, str(error), "winner") from None

    def _answer(self, name: str) -> Kept:
        kept = self._kept.get(name)
        if kept is None:
            raise Refusal(
                404,
                f"there is no answer {name[:80]} to vote on: it is too old, is not whole, has "
                "several choices, repeats its prompt, or the model read more than texts of a chat "
                "that ends with its user",
                "completions",
            )
        return kept


class StreamReader:
    """Puts an answer together from the events of its stream."""

    def __init__(self, votes: Votes, kind: Kind, body: Mapping[str, Any], version: str) -> None:
        self._votes, self._kind, self._body, self._version = votes, kind, body, version
        self._name, self._text, self._choices = "", "", {0}
        self._is_broken = False

    def read(self, events: str) -> None:
        """Read whole events."""
        for line in events.splitlines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            tree = json.loads(data)
            self._is_broken |= "error" in tree
            self._name = tree.get("id", self._name)
            for choice in tree.get("choices", []):
                self._choices.add(choice["index"])
                part = choice["delta"].get("content") if self._kind == "chat" else choice["text"]
                self._text += part or ""

    def end(self) -> None:
        """Keep what was read, unless an error broke it off."""
        if self._is_broken:
            return
        self._votes._keep(
            self._kind, self._body, self._name, self._text, len(self._choices), self._version
        )


def opening_of(kind: Kind, body: Mapping[str, Any]) -> Record | None:
    """Return the prompt or chat as a comparison record has it; None for one that it cannot hold."""
    if body.get("echo"):
        return None  # the answer begins with the prompt
    if kind == "completions":
        prompt = body.get("prompt")
        opening = {"prompt": prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt}
    elif any(body.get(name) for name in READ_BESIDE) or not body.get("add_generation_prompt", True):
        return None
    else:
        opening = {"messages": body.get("messages")}
    try:
        check("", opening, "prompt")
    except RecipeError:
        return None
    return opening if prompt_text(opening) else None


def _labeller(user: str | None) -> str:
    """Return a user's name as the store has names: short, of letters, digits and few signs."""
    if user is None:
        return NOBODY
    if LABELLER.fullmatch(user):
        return user
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:32]}"
