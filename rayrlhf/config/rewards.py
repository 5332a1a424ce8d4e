"""What PPO's score is made of: reward models, ensembles, Python functions, HTTP endpoints."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field

from rayrlhf.config.section import NonNegative, Positive, PositiveFloat, Section

KEYS_OF = {
    "model": (),
    "members": ("std_penalty",),
    "function": ("timeout_s", "request_size", "default_score"),
    "url": ("timeout_s", "retries", "request_size", "max_pending", "headers_env", "default_score"),
}
"""The kinds of a reward, and the keys that each reads beside `name` and `weight`."""
TAKEN = ("score_mean", "score_std", "return_mean", "equal_groups")
"""Metrics of `reward/` that are those of the whole score."""
REQUEST_SIZE = 32
"""Responses in one request to an endpoint."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0


class RewardSource(Section):
    """A part of the score: one of `model`, `members`, `function` and `url`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Its mean is the metric `reward/<name>`. None: the function's name, the endpoint's host, the
    folder of the model (of `reward/final` that is `reward`), or `ensemble`."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """The score is the sum of weight times part; 0 only watches the part."""
    model: str | None = None
    """A reward model: a folder, or a hub's name."""
    members: str | tuple[str, ...] | None = None
    """Reward models of which each scores: their folders, or the folder `reward` of a run with
    `reward.num_members` above 1."""
    std_penalty: NonNegative | None = None
    """k of an ensemble's score, mean - k * standard deviation over the members (of the population).
    Uncertainty-weighted optimization of arXiv:2310.02743 subtracts a multiple of the variance
    instead; the standard deviation has the unit of the score, so that k has none."""
    function: str | None = None
    """`package.module:name` or `path/to/file.py:name` of a Python function
    `(prompts: list[str], responses: list[str]) -> list[float]`."""
    url: str | None = None
    """An endpoint that takes a POST of {"prompts": [...], "responses": [...]} and answers
    {"scores": [...]}."""
    timeout_s: PositiveFloat = 60
    """Longest that a function may take for one call, or an endpoint for one request."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a request is repeated after an error 429 or 5xx, a timeout, or a connection that
    fails; the pauses double from 0.5 s to 8 s."""
    request_size: Positive | None = None
    """Responses in one request or call. None: 32 for an endpoint, all of a worker's for a
    function."""
    default_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Score of the responses whose call is not done after `timeout_s` (it is ended, with the
    function's process) or ended its process, or whose request failed after its retries;
    `reward/<name>_missing` is their part. None: the run ends, and names the reward."""
    max_pending: Positive = 4
    """Requests that are under way at the same time; the others wait."""
    headers_env: str | None = None
    """Environment variable, on the node of the reward worker, with a JSON object of headers, such
    as {"Authorization": "Bearer ..."}: so they are in no recipe and no log."""

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(kind for kind in KEYS_OF if vars(self)[kind] is not None)

    @property
    def is_of_models(self) -> bool:
        """Whether the scores are those of reward models, which the worker holds."""
        return self.kind in ("model", "members")

    @property
    def title(self) -> str:
        """The name that its metric has."""
        if self.name is not None:
            return self.name
        if self.members is not None:
            return "ensemble"
        if self.function is not None:
            return self.function.rpartition(":")[2]
        if self.url is not None:
            return str(urlsplit(self.url).hostname)
        parts = PurePath(str(self.model)).parts
        return parts[-2] if parts[-1] == "final" and len(parts) > 1 else parts[-1]

    @property
    def columns(self) -> tuple[tuple[str, float], ...]:
        """(Metric, weight in the score) of each number that it gives a response."""
        own = (f"reward/{self.title}", self.weight)
        if self.members is not None:
            return own, (f"{own[0]}_std", 0.0)
        return (own,) if self.default_score is None else (own, (f"{own[0]}_missing", 0.0))

    @property
    def patience_s(self) -> float:
        """Longest that a function's call or an endpoint's request takes, pauses included."""
        if self.url is None:
            return self.timeout_s
        pauses = sum(backoff_s(attempt) for attempt in range(self.retries))
        return self.timeout_s * (1 + self.retries) + pauses


def backoff_s(attempt: int) -> float:
    """Return the pause after the attempt number `attempt`, from 0 on, to ask an endpoint."""
    return min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0**attempt)


def key_of(index: int, reward: RewardSource) -> str:
    """Return how errors name a reward: its place in the recipe, and what is there.

    Of an endpoint without its query, which may hold a key.
    """
    value = str(vars(reward)[reward.kind])
    shown = value.partition("?")[0] if reward.kind == "url" else value
    return f"ppo.rewards.{index}.{reward.kind}={shown}"


def check_rewards(rewards: Sequence[RewardSource], deadline_s: float) -> None:
    """Raise ValueError for a reward of no or of two kinds, a key without effect, a name twice."""
    for index, reward in enumerate(rewards):
        check_kind(f"ppo.rewards.{index}", reward, KEYS_OF, noun="reward", verb="scores")
        _ensemble_fits(f"ppo.rewards.{index}", reward)
        _can_be_read(f"ppo.rewards.{index}", reward)
        if not reward.is_of_models and reward.patience_s >= deadline_s:
            raise ValueError(
                f"ppo.rewards.{index} may take {reward.patience_s:g} s (timeout_s="
                f"{reward.timeout_s:g}, and its retries), and ppo.deadline_s={deadline_s:g} is "
                "not longer: lower timeout_s, or raise ppo.deadline_s"
            )
    metrics = [metric for reward in rewards for metric, _ in reward.columns]
    for metric, count in Counter(metrics).items():
        name = metric.removeprefix("reward/")
        if count > 1 or name in TAKEN:
            who = f"{count} of ppo.rewards have" if count > 1 else "the whole score has"
            raise ValueError(f"{who} the metric {metric}: give each of ppo.rewards a `name`")


def slowest_s(rewards: Sequence[RewardSource], num_responses: int) -> float:
    """Return how long the slowest of them may take for so many responses of one worker."""
    longest = 0.0
    for reward in rewards:
        if not reward.is_of_models:
            of_one = REQUEST_SIZE if reward.url is not None else num_responses
            requests = math.ceil(num_responses / (reward.request_size or of_one))
            rounds = math.ceil(requests / (reward.max_pending if reward.url is not None else 1))
            longest = max(longest, rounds * reward.patience_s)
    return longest


def check_kind(
    place: str, section: Section, keys_of: Mapping[str, Sequence[str]], *, noun: str, verb: str
) -> None:
    """Raise ValueError unless just one key of `keys_of` is set, and no key of another kind.

    `keys_of` are the kinds of what is at `place`, and the keys that each reads.
    """
    kinds = [kind for kind in keys_of if vars(section)[kind] is not None]
    if len(kinds) != 1:
        raise ValueError(
            f"{place} has {' and '.join(kinds) or f'nothing that {verb}'}: give each {noun} one of "
            f"{', '.join(keys_of)}"
        )
    for key in sorted({key for keys in keys_of.values() for key in keys}):
        default = type(section).model_fields[key].default
        if key not in keys_of[kinds[0]] and vars(section)[key] != default:
            raise ValueError(f"{place}.{key} has no effect with {kinds[0]}: take it out")


def _ensemble_fits(place: str, reward: RewardSource) -> None:
    if reward.members is not None and reward.std_penalty is None:
        raise ValueError(
            f"{place}.std_penalty is missing: how many standard deviations of the members to "
            "subtract from their mean; 0 takes the mean alone"
        )
    if isinstance(reward.members, tuple) and len(set(reward.members)) < 2:
        raise ValueError(
            f"{place}.members={list(reward.members)}: an ensemble has two models or more: name "
            "them, or set model"
        )


def _can_be_read(place: str, reward: RewardSource) -> None:
    if reward.function is not None:
        check_function(place, reward.function)
    if reward.url is not None:
        check_url(
            place,
            reward.url,
            secret="them into a header, and the header into the variable of headers_env",
        )


def check_function(place: str, function: str) -> None:
    """Raise ValueError for a function's place that is none; `place` is its section."""
    name = r"(.*\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_]\w*"
    if not re.fullmatch(name, function):
        raise ValueError(
            f"{place}.function={function}: write package.module:name or path/to/file.py:name"
        )


def check_url(place: str, address: str, *, secret: str) -> None:
    """Raise ValueError for a URL that is none, or holds a password; `secret` is where to put it."""
    try:
        url = urlsplit(address)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is none
        is_address = False
    if not is_address:
        raise ValueError(f"{place}.url={address}: write http://HOST:PORT/PATH or https://HOST/PATH")
    if url.username is not None or url.password is not None:
        raise ValueError(
            f"{place}.url for {url.hostname} has a name or password, which every log would show: "
            f"put {secret}"
        )
