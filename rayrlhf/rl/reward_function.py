"""A reward from a Python function of the user's, called in a process beside the worker.

The driver never runs the user's code: it checks it in a process of its own. What a call takes
longer than `timeout_s` for is ended with its process, whatever it does there.
"""

import textwrap
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from rayrlhf import console
from rayrlhf.config import Recipe, RecipeError, RewardSource, key_of
from rayrlhf.external.function_process import FunctionDied, FunctionProcess
from rayrlhf.external.functions import check, place_of

Answer = Future[list[float | None]]
Asked = tuple[list[str], list[str], Answer]
"""Prompts, their responses, and where the scores go."""


class FunctionScorer:
    """Calls a function beside the caller."""

    def __init__(self, key: str, where: str, reward: RewardSource) -> None:
        """`key` names it in errors; `where` is its place, a file with an absolute path."""
        self.key = key
        self._asked: SimpleQueue[Asked | None] = SimpleQueue()
        calls = Calls(key, reward, FunctionProcess(key, where))
        # A daemon: a call that is under way does not keep its process from ending.
        threading.Thread(target=calls.work, args=(self._asked,), daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def submit(self, prompts: list[str], responses: list[str]) -> Answer:
        """Start the calls; the answer are the scores, None for each that there is none of."""
        answer: Answer = Future()
        self._asked.put((prompts, responses, answer))
        return answer


@dataclass(frozen=True)
class Calls:
    """The calls of a function, one after the other."""

    key: str
    reward: RewardSource
    process: FunctionProcess

    def work(self, asked: "SimpleQueue[Asked | None]") -> None:
        """Answer what is asked, up to None; in one thread, with which the process ends."""
        while (found := asked.get()) is not None:
            prompts, responses, answer = found
            size = self.reward.request_size or len(responses)
            scores: list[float | None] = []
            try:
                for i in range(0, len(responses), size):
                    scores += self._call(prompts[i : i + size], responses[i : i + size])
                answer.set_result(scores)
            except BaseException as error:
                answer.set_exception(error)
        self.process.close()

    def _call(self, prompts: list[str], responses: list[str]) -> list[Any]:
        """Return the scores, or under `default_score` None for each when there are none."""
        timeout_s, default = self.reward.timeout_s, self.reward.default_score
        try:
            scores = self.process.call(prompts, responses, timeout_s)
            if len(scores) != len(responses):
                raise RecipeError(
                    f"{self.key}: it gave {len(scores)} scores for {len(responses)} responses: "
                    "return one finite number for each response, in their order"
                )
            return scores
        except TimeoutError:
            late = f"{self.key}: it is not done after timeout_s={timeout_s:g} s for "
            if default is None:
                raise TimeoutError(
                    f"{late}{len(responses)} responses: make it faster, raise timeout_s, or set "
                    "default_score, and request_size for how many responses share it"
                ) from None
            say_missing(late, prompts, responses, default)
        except FunctionDied as error:
            if default is None:
                raise
            say_missing(f"{error}, for ", prompts, responses, default)
        return [None] * len(responses)


def say_missing(why: str, prompts: list[str], responses: list[str], default: float) -> None:
    """Print of which responses there is no score, after `why`."""
    first = textwrap.shorten(f"{prompts[0]}{responses[0]}", width=200, placeholder=" ...")
    console.say(
        f"ppo: {why}{len(responses)} responses: default_score={default:g} in place of their "
        f"scores; the first is {first!r}"
    )


def check_functions(recipe: Recipe) -> None:
    """Raise RecipeError unless the functions of `ppo.rewards` can be imported and called."""
    for index, reward in enumerate(recipe.ppo.rewards if recipe.ppo else ()):
        if reward.function is not None:
            check(key_of(index, reward), place_of(reward.function))
