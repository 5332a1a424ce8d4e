"""A reward from an HTTP endpoint: POST {"prompts", "responses"} -> {"scores"}.

A step's responses go out in requests of `request_size`, at most `max_pending` of them under way;
each is repeated after an error that may pass (408, 429, 5xx, a timeout, a connection that fails),
with pauses that double, and the whole of each attempt has `timeout_s`. Proxies are those of the
environment; redirects are not followed, because they would turn a POST into a GET and hand the
headers on.
"""

import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from rayrlhf.config import RecipeError, RewardSource, backoff_s

PASSING = (408, 429)
"""Errors below 500 that may pass."""
LONGEST_ANSWER = 1 << 24
"""Bytes of an answer that are read at most."""
SAMPLE = (["The movie was"], [" good."])
"""What an endpoint is asked about before the run."""


class EndpointDown(RuntimeError):
    """An endpoint did not answer, or with an error that may pass, however often it was asked."""


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request to follow."""


class EndpointScorer:
    """Asks an endpoint beside the caller."""

    def __init__(self, key: str, where: str, reward: RewardSource) -> None:
        """`key` names it in errors, `where` is its URL; raises RecipeError for its headers."""
        self.key, self.reward = key, reward
        self.timeout_s = math.inf  # each request has its own
        self._url = where
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            **headers_of(key, reward),
        }
        self._open = urllib.request.build_opener(NoRedirects).open
        self._stopped = threading.Event()

    def try_out(self) -> None:
        """Ask for one score; raises RecipeError that says what came instead."""
        try:
            self._ask(*SAMPLE)
        except EndpointDown as error:
            raise RecipeError(
                f"{error}. It was asked before the run: start it, or correct url"
            ) from None

    def submit(self, prompts: list[str], responses: list[str]) -> Future[Any]:
        """Start the requests; the answer are the scores of all of them."""
        answer: Future[Any] = Future()
        threading.Thread(target=self._work, args=(answer, prompts, responses), daemon=True).start()
        return answer

    def _work(self, answer: Future[Any], prompts: list[str], responses: list[str]) -> None:
        size = self.reward.request_size
        scores: list[float] = [math.nan] * len(responses)
        pool = ThreadPoolExecutor(self.reward.max_pending)
        try:
            parts = {
                pool.submit(self._ask, prompts[i : i + size], responses[i : i + size]): i
                for i in range(0, len(responses), size)
            }
            for part in as_completed(parts):
                found = part.result()
                scores[parts[part] : parts[part] + len(found)] = found
        except BaseException as error:
            self._stopped.set()  # nobody waits for the others
            answer.set_exception(error)
        else:
            answer.set_result(scores)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, prompts: list[str], responses: list[str]) -> list[Any]:
        """Return what one request is answered, and ask again where that may help."""
        body = json.dumps({"prompts": prompts, "responses": responses}).encode()
        attempts = 1 + self.reward.retries
        for attempt in range(attempts):
            try:
                answer = self._post(body)
                break
            except urllib.error.HTTPError as error:
                said = f"it answered {error.code} {error.reason}{_quoted(_head_of(error))}"
                if error.code < 500 and error.code not in PASSING:
                    raise RecipeError(f"{self.key}: {said}{_advice(error)}") from None
            except (OSError, http.client.HTTPException) as error:
                said = _reason(error, self.reward.timeout_s)
            if attempt + 1 == attempts:
                raise EndpointDown(f"{self.key}: {said} (asked {attempts} times)")
            if self._stopped.wait(backoff_s(attempt)):
                raise EndpointDown(f"{self.key}: {said}, and other requests failed for good")
        return self._scores(answer, len(responses))

    def _post(self, body: bytes) -> bytes:
        """Return the body of the answer; raises OSError, HTTPException, or HTTPError."""
        ends = time.monotonic() + self.reward.timeout_s
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        answer = bytearray()
        with self._open(request, timeout=self.reward.timeout_s) as response:
            # The time of a socket is that of one read: an answer that drips is not late there.
            while part := response.read1(1 << 16):
                answer += part
                if time.monotonic() > ends:
                    raise TimeoutError
                if len(answer) > LONGEST_ANSWER:
                    raise RecipeError(f"{self.key}: its answer is longer than any scores are")
        return bytes(answer)

    def _scores(self, answer: bytes, wanted: int) -> list[Any]:
        try:
            tree = json.loads(answer)
        except ValueError:
            raise RecipeError(f"{self.key}: its answer is not JSON{_quoted(answer)}") from None
        scores = tree.get("scores") if isinstance(tree, dict) else None
        if not isinstance(scores, list):
            raise RecipeError(
                f'{self.key}: its answer has no list "scores"{_quoted(answer)}: let it answer '
                '{"scores": [number, ...]}'
            )
        if len(scores) != wanted:
            raise RecipeError(
                f"{self.key}: it gave {len(scores)} scores for {wanted} responses: let it answer "
                "one number for each, in their order"
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


def _reason(error: Exception, timeout_s: float) -> str:
    """Return what went wrong with a connection."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"it did not answer within timeout_s={timeout_s:g} s"
    return f"there is no answer ({type(cause).__name__}: {cause})"


def _head_of(error: urllib.error.HTTPError) -> bytes:
    """Return how the body of an error begins, as far as there is one."""
    try:
        return error.read(300)
    except (OSError, http.client.HTTPException):
        return b""


def _advice(error: urllib.error.HTTPError) -> str:
    if 300 <= error.code < 400:
        return f": set url to where it is, {error.headers.get('Location')}"
    if error.code in (401, 403):
        return ": set headers_env to a variable with the header that it asks for"
    return ": correct url, or what the endpoint makes of a request"


def _quoted(body: bytes) -> str:
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return f": {text!r}" if text else ""
