"""A reward from an HTTP endpoint: POST {"prompts", "responses"} -> {"scores"}.

A step's responses go out in requests of `request_size`, at most `max_pending` of them under way.
"""

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from rayrlhf.config import RecipeError, RewardSource
from rayrlhf.config.rewards import REQUEST_SIZE
from rayrlhf.external.endpoints import Endpoint, EndpointDown, quoted
from rayrlhf.rl.reward_function import say_missing

SAMPLE = (["The movie was"], [" good."])
"""What an endpoint is asked about before any response is sent to it."""


class EndpointScorer:
    """Asks an endpoint beside the caller."""

    def __init__(self, key: str, where: str, reward: RewardSource) -> None:
        """`key` names it in errors, `where` is its URL; raises RecipeError for its headers."""
        self.key, self.reward = key, reward
        self._endpoint = Endpoint(
            key,
            where,
            headers=headers_of(key, reward),
            timeout_s=reward.timeout_s,
            retries=reward.retries,
            sign_in="set headers_env to a variable with the header that it asks for",
        )

    def try_out(self) -> None:
        """Ask for one score; raises RecipeError that says what came instead."""
        try:
            self._ask(*SAMPLE)
        except EndpointDown as error:
            raise RecipeError(
                f"{error}. It is asked once when its worker starts: start it, or correct url"
            ) from None

    def submit(self, prompts: list[str], responses: list[str]) -> Future[list[float | None]]:
        """Start the requests; the answer are the scores, None for each that there is none of."""
        answer: Future[list[float | None]] = Future()
        threading.Thread(target=self._work, args=(answer, prompts, responses), daemon=True).start()
        return answer

    def _work(self, answer: Future[Any], prompts: list[str], responses: list[str]) -> None:
        size = self.reward.request_size or REQUEST_SIZE
        scores: list[float | None] = [None] * len(responses)
        pool = ThreadPoolExecutor(self.reward.max_pending)
        try:
            parts = {
                pool.submit(self._try, prompts[i : i + size], responses[i : i + size]): i
                for i in range(0, len(responses), size)
            }
            for part in as_completed(parts):
                found = part.result()
                scores[parts[part] : parts[part] + len(found)] = found
        except BaseException as error:
            self._endpoint.stop()  # nobody waits for the others
            answer.set_exception(error)
        else:
            answer.set_result(scores)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _try(self, prompts: list[str], responses: list[str]) -> list[Any]:
        """Return `_ask`, or under `default_score` None for each response when it is down."""
        try:
            return self._ask(prompts, responses)
        except EndpointDown as error:
            if self.reward.default_score is None:
                raise
            say_missing(f"{error}, for ", prompts, responses, self.reward.default_score)
        return [None] * len(responses)

    def _ask(self, prompts: list[str], responses: list[str]) -> list[Any]:
        """Return the scores in one request's answer."""
        tree = self._endpoint.ask({"prompts": prompts, "responses": responses})
        scores = tree.get("scores") if isinstance(tree, dict) else None
        if not isinstance(scores, list):
            shown = quoted(json.dumps(tree).encode())
            raise RecipeError(
                f'{self.key}: its answer has no list "scores"{shown}: let it answer '
                '{"scores": [number, ...]}'
            )
        if None in scores:
            raise RecipeError(
                f"{self.key}: it gave null for response {scores.index(None) + 1} of "
                f"{len(responses)}: let it answer one number for each"
            )
        if len(scores) != len(responses):
            raise RecipeError(
                f"{self.key}: it gave {len(scores)} scores for {len(responses)} responses: let it "
                "answer one number for each, in their order"
            )
        return scores


def headers_of(key: str, reward: RewardSource) -> dict[str, str]:
    """Return the headers in the variable of `headers_env`; the error never shows their values."""
    if reward.headers_env is None:
        return {}
    text = os.environ.get(reward.headers_env)
    if text is None:
        raise RecipeError(
            f"{key}: headers_env={reward.headers_env} is not set on the node of the reward worker: "
            "set it before the cluster starts, or in the runtime_env of the job"
        )
    try:
        headers = json.loads(text)
    except ValueError:
        headers = None
    if not isinstance(headers, Mapping) or not all(
        isinstance(value, str) and value.isprintable() for value in headers.values()
    ):
        raise RecipeError(
            f"{key}: the variable {reward.headers_env} is not a JSON object of strings, such as "
            '{"Authorization": "Bearer ..."}'
        )
    return dict(headers)
