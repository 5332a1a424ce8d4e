"""A reward from a Python function of the user's, called in a worker.

The driver never runs the user's code: it checks it in a process of its own. A worker calls it in a
thread, and waits no longer than `timeout_s`.
"""

import threading
from concurrent.futures import Future
from typing import Any

from rayrlhf.config import Recipe, RewardSource, key_of
from rayrlhf.external.functions import check, load, place_of


class FunctionScorer:
    """Calls a function beside the caller."""

    def __init__(self, key: str, where: str, reward: RewardSource) -> None:
        """`key` names it in errors; `where` is its place, a file with an absolute path."""
        self.key, self.timeout_s = key, reward.timeout_s
        self._function = load(key, where)

    def submit(self, prompts: list[str], responses: list[str]) -> Future[Any]:
        """Start the call."""
        answer: Future[Any] = Future()

        def work() -> None:
            try:
                answer.set_result(self._function(list(prompts), list(responses)))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: one that hangs does not keep its process from ending.
        threading.Thread(target=work, daemon=True).start()
        return answer


def check_functions(recipe: Recipe) -> None:
    """Raise RecipeError unless the functions of `ppo.rewards` can be imported and called."""
    for index, reward in enumerate(recipe.ppo.rewards if recipe.ppo else ()):
        if reward.function is not None:
            check(key_of(index, reward), place_of(reward.function))
