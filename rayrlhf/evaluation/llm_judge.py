"""A language model as the judge of two answers, over an OpenAI-compatible API.

Each pair of answers is shown in both orders, and wins count only where both verdicts agree
("swapping positions" of arXiv:2306.05685, section 3.4); other battles are ties. How often the
orders disagree, and how often the first answer wins, is part of what comes out. A reply without a
verdict is asked for again; where none comes, the battle is not decided, and is no tie.
Departures: the verdict is the last one of a reply, and there is no reference answer.
"""

import math
import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrlhf import console
from rayrlhf.config import JudgeConfig, RecipeError, api_url
from rayrlhf.evaluation.verdicts import VerdictCache, key_of_request
from rayrlhf.external.endpoints import Endpoint, EndpointDown, Refused, authorization, quoted

Floats = npt.NDArray[np.float64]

SYSTEM = (
    "You compare two responses, A and B, to the same prompt. {question}\n"
    "Explain in a few sentences, then end with your verdict on a line of its own: [[A]] if "
    "response A is better, [[B]] if response B is better, [[C]] for a tie."
)
USER = (
    "<prompt>\n{prompt}\n</prompt>\n\n<response_a>\n{a}\n</response_a>\n\n"
    "<response_b>\n{b}\n</response_b>"
)
REMINDER = "That has no verdict. Answer with one of [[A]], [[B]] and [[C]], and nothing else."
VERDICT = re.compile(r"\[\[([ABC])\]\]")
SWAPPED = {"A": "B", "B": "A", "C": "C"}
LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class Battle:
    """A prompt with the answers of two models."""

    prompt: str
    first: str
    second: str

    @property
    def is_even(self) -> bool:
        """Whether the answers are the same: a tie, about which nobody is asked."""
        return self.first == self.second


@dataclass(frozen=True)
class Positions:
    """What the two orders of the asked battles say of the judge; counts."""

    asked: int
    """Battles with different answers."""
    undecided: int
    """Of those, battles in which at least one order brought no verdict."""
    inconsistent: int
    """Of the others, battles in which the verdict changed with the order."""
    first_wins: int
    """Verdicts, of both orders, for the answer that was shown first."""
    second_wins: int
    """Verdicts for the answer that was shown second."""


Verdicts = tuple[str | None, str | None]
"""With the first model's answer as A, and as B: A, B, C, or None where no verdict came."""


class LLMJudge:
    """Asks a language model about battles."""

    def __init__(self, key: str, judge: JudgeConfig, cache: VerdictCache) -> None:
        """`key` names it in errors; raises RecipeError where its key is not in the environment."""
        assert judge.url is not None, "it is a judge with a url"
        self.key, self.name = key, judge.title
        self._judge, self._cache = judge, cache
        self._url = api_url(judge.url)
        self._endpoint = Endpoint(
            key,
            self._url,
            headers=authorization(key, judge.key_env),
            timeout_s=judge.timeout_s,
            retries=judge.retries,
            sign_in="set key_env to a variable with a key that is valid there",
        )

    def try_out(self) -> None:
        """Ask for one verdict, in the first run only; RecipeError says what came instead."""
        try:
            verdict = self._verdict("Say hello.", "Hello!", "No.")
        except EndpointDown as error:
            raise RecipeError(
                f"{error}. It was asked before the evaluation: start it, or correct url"
            ) from None
        if verdict is None:
            raise RecipeError(
                f"{self.key}: {self._judge.llm} gives no verdict on {1 + self._judge.retries} "
                "tries: raise the limit of tokens in options, or name another llm"
            )

    def judge(self, battles: Sequence[Battle]) -> list[Verdicts]:
        """Return the verdicts on each battle; ("C", "C") for one that is even.

        Raises RecipeError and EndpointDown as `Endpoint.ask` does; what came until then is kept.
        """
        orders = [
            order
            for battle in battles
            if not battle.is_even
            for order in (
                (battle.prompt, battle.first, battle.second),
                (battle.prompt, battle.second, battle.first),
            )
        ]
        pool = ThreadPoolExecutor(self._judge.max_pending)
        asked = {order: pool.submit(self._try, *order) for order in dict.fromkeys(orders)}
        try:
            self._wait(list(asked.values()))
        except EndpointDown as error:
            raise EndpointDown(
                f"{error}. {len(self._cache)} verdicts are kept in {self._cache.path}: run it "
                "again to go on from there"
            ) from None
        finally:
            # If it ended early, what is under way is paid for, and not asked again.
            if not all(future.done() for future in asked.values()):
                self._endpoint.stop()
            pool.shutdown(cancel_futures=True)
        found = iter([asked[order].result() for order in orders])
        return [("C", "C") if battle.is_even else (next(found), next(found)) for battle in battles]

    def _wait(self, asked: Sequence[Future[str | None]]) -> None:
        """Wait for all of them, with a line now and then; raises what the first one raised."""
        pending = set(asked)
        while pending:
            done, pending = wait(pending, timeout=LINE_EVERY_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if pending:
                console.say(
                    f"{'evaluate':>9} {self.name}: {len(asked) - len(pending)} of {len(asked)} "
                    "verdicts"
                )

    def _try(self, prompt: str, a: str, b: str) -> str | None:
        """Return the like of `_verdict`; None, too, where this very question is refused.

        An answer longer than the judge's context, or one that a filter stops, is one battle less.
        """
        try:
            return self._verdict(prompt, a, b)
        except Refused:
            return None

    def _verdict(self, prompt: str, a: str, b: str) -> str | None:
        """Return A, B or C; None where no reply holds a verdict."""
        messages = [
            {"role": "system", "content": SYSTEM.format(question=self._judge.question)},
            {"role": "user", "content": USER.format(prompt=prompt, a=a, b=b)},
        ]
        body = {"model": self._judge.llm, **self._judge.options, "messages": messages}
        key = key_of_request(self._url, body)
        known = self._cache.get(key)
        if known is not None:
            return known
        for _ in range(1 + self._judge.retries):
            reply = self._reply(body)
            found = VERDICT.findall(reply)
            if found:
                self._cache.add(key, found[-1], reply)
                return str(found[-1])
            # The same question would get the same reply from a model that is not sampled.
            if reply.strip():
                said = {"role": "assistant", "content": reply}
                body["messages"] = [*messages, said, {"role": "user", "content": REMINDER}]
            else:  # many templates want the roles in turn
                system, user = messages
                more = {**user, "content": f"{user['content']}\n\n{REMINDER}"}
                body["messages"] = [system, more]
        return None

    def _reply(self, body: dict[str, Any]) -> str:
        tree = self._endpoint.ask(body)
        try:
            content = tree["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            shown = quoted(repr(tree).encode())
            raise RecipeError(
                f"{self.key}: its answer has no choices[0].message.content{shown}: set url to an "
                "OpenAI-compatible API"
            ) from None
        return content if isinstance(content, str) else ""


def settle(verdicts: Sequence[Verdicts]) -> Floats:
    """Return (N,): 1 where both orders are for the first model, 0 for the second, else 0.5.

    NaN where an order brought no verdict.
    """
    won: dict[Verdicts, float] = {("A", "B"): 1.0, ("B", "A"): 0.0}
    return np.array([math.nan if None in both else won.get(both, 0.5) for both in verdicts])


def positions(battles: Sequence[Battle], verdicts: Sequence[Verdicts]) -> Positions:
    """Count what the two orders say, over the battles that were asked about."""
    asked = [both for battle, both in zip(battles, verdicts, strict=True) if not battle.is_even]
    decided = [(one, two) for one, two in asked if one is not None and two is not None]
    flat = [verdict for both in decided for verdict in both]
    return Positions(
        asked=len(asked),
        undecided=len(asked) - len(decided),
        inconsistent=sum(SWAPPED[one] != two for one, two in decided),
        first_wins=flat.count("A"),
        second_wins=flat.count("B"),
    )
