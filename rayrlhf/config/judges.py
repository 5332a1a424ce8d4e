"""Who fights and who judges in the battles of `rayrlhf evaluate`."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from rayrlhf.config.rewards import check_function, check_kind, check_url
from rayrlhf.config.section import Positive, PositiveFloat, Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
KEYS_OF: dict[str, tuple[str, ...]] = {
    "model": (),
    "function": (),
    "url": ("llm", "key_env", "question", "options", "timeout_s", "retries", "max_pending"),
}
"""The kinds of a judge, and the keys that each reads beside `name`."""
ROUND = r"round-\d+$"
"""Names of the policies of `rounds`."""
OWN_JUDGES = ("vader", "reward")
OWN_MODELS = ("base", "sft", "dpo", "ppo", "ppo_ptx")


class JudgeConfig(Section):
    """A judge of battles: one of `model`, `function` and `url`."""

    name: Annotated[str, Field(pattern=NAME)] | None = None
    """Its key in results.json. None: the function's name, the name of the language model, or the
    folder of the reward model (of `x/reward/final` that is `reward`)."""
    model: str | None = None
    """A reward model, a folder or a hub's name, read with the tokenizer that is there."""
    function: str | None = None
    """`package.module:name` or `path/to/file.py:name` of a Python function
    `(prompts: list[str], responses: list[str]) -> list[float]`; the higher number wins."""
    url: str | None = None
    """An OpenAI-compatible API, such as https://api.openai.com/v1 or http://HOST:8000/v1, with a
    language model that sees both answers, in both orders."""
    llm: str | None = None
    """Name of the language model at `url`."""
    key_env: str | None = None
    """Environment variable with the key of the API, so that it is in no recipe and no log."""
    question: str = (
        "Which response is the better answer to the prompt? Consider how helpful, relevant, "
        "accurate, deep and creative each is. Do not let the order or the length of the responses "
        "sway you."
    )
    """What it is asked about two responses. How to answer is said to it beside this."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 512}
    """Further fields of a request; the verdict comes at the end of the answer."""
    timeout_s: PositiveFloat = 60
    """Longest that one request may take."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a request is repeated after an error 429 or 5xx, a timeout, or a connection that
    fails, with pauses that double from 0.5 s to 8 s; and how often it is asked again after an
    answer that is no verdict."""
    max_pending: Positive = 8
    """Requests that are under way at the same time."""

    @property
    def kind(self) -> str:
        """Which of the three it is."""
        return next(kind for kind in KEYS_OF if vars(self)[kind] is not None)

    @property
    def title(self) -> str:
        """Its key in results.json."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        if self.url is not None:
            return re.sub(r"[^A-Za-z0-9._-]", "-", str(self.llm))
        parts = PurePath(str(self.model)).parts
        return parts[-2] if parts[-1] == "final" and len(parts) > 1 else parts[-1]


def judge_key(place: str, judge: JudgeConfig) -> str:
    """Return how errors name a judge: its `place` in the recipe, and what is there."""
    value = str(vars(judge)[judge.kind])
    shown = value.partition("?")[0] if judge.kind == "url" else value
    return f"{place}.{judge.kind}={shown}"


def check_judges(judges: Sequence[JudgeConfig]) -> None:
    """Raise ValueError for a judge of no or of two kinds, a key without effect, a name twice."""
    for index, judge in enumerate(judges):
        check_judge(f"evaluate.judges.{index}", judge)
    names = Counter([*OWN_JUDGES, *(judge.title for judge in judges)])
    for name, count in names.items():
        if count > 1:
            raise ValueError(
                f"evaluate.judges has {name!r} {'twice' if name not in OWN_JUDGES else 'too'}, and "
                f"results are kept by name ({', '.join(OWN_JUDGES)} are those of the run): give "
                "one of them another `name`"
            )


def check_judge(place: str, judge: JudgeConfig) -> None:
    """Raise ValueError, with its `place` in the recipe, for no or two kinds, or a wrong key."""
    check_kind(place, judge, KEYS_OF, noun="judge", verb="judges")
    if judge.function is not None:
        check_function(place, judge.function)
    if judge.url is not None:
        check_url(place, judge.url, secret="its key into the variable of key_env")
        if judge.llm is None:
            raise ValueError(f"{place}.llm is missing: name the language model at {place}.url")


def check_contestants(models: Mapping[str, str]) -> None:
    """Raise ValueError for a name that no key can be, or that a stage of the run has."""
    for name in models:
        if not re.match(NAME, name) or name in OWN_MODELS or re.match(ROUND, name):
            raise ValueError(
                f"evaluate.models has {name!r}: a name is made of letters, digits and ._- and is "
                f"none of {', '.join(OWN_MODELS)}, the stages of the run, nor round-1, ...: "
                "change it"
            )


def api_url(base: str) -> str:
    """Return the address of chat completions under the address of an API."""
    url = urlsplit(base)
    path = url.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return url._replace(path=path).geturl()
