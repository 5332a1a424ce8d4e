"""How long prompts and responses are: from the data and the run where they are, else assumed.

A prompt's tokens are its characters over CHARS_PER_TOKEN; of a response the mean is that of the
run's own metrics, or half of the longest. Responses are spread like a truncated exponential: many
short ones, and a part that is cut at the limit.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rayrlhf.config import Recipe
from rayrlhf.data.builtin import cache_dir

CHARS_PER_TOKEN = {4096: 3.7, 50_000: 4.3, 200_000: 4.5}
"""Of English text, by the largest vocabulary that it holds for; measured on the built-in ratings
with vocabularies of 4,096 and 49,152; the third is from Llama 3's report (arXiv:2407.21783: 3.17 to
3.94 characters with the code and the languages of its data) and a guess for English."""
NUM_READ = 1000
"""Records whose length is taken."""
RESPONSE_PART = 0.5
"""Mean response over the longest, where nothing is known."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a PPO step's sequences."""

    prompt: float
    """Mean."""
    response: float
    """Mean."""
    longest_response: int
    source: str
    """Where the two means are from, for the person to judge."""

    @property
    def total(self) -> float:
        """Mean of prompt and response together."""
        return self.prompt + self.response

    def responses(self, count: int) -> list[int]:
        """Return the lengths of `count` responses, longest first: quantiles, not a draw."""
        return quantiles(count, self.response, self.longest_response)


def quantiles(count: int, mean: float, longest: int) -> list[int]:
    """Return `count` lengths from 1 to `longest` with this mean, longest first.

    The middles of equal parts of an exponential that is cut at `longest`, as max_tokens cuts.
    """
    scale = exponential_scale(min(mean, longest), longest)
    if math.isinf(scale):
        return [longest] * count
    parts = ((index + 0.5) / count for index in range(count))
    return [max(1, min(longest, round(-scale * math.log(part)))) for part in parts]


def exponential_scale(mean: float, longest: int) -> float:
    """Return the scale whose exponential, cut at `longest`, has `mean`: s (1 - e^(-L / s))."""
    if mean >= 0.999 * longest:
        return math.inf
    low, high = 1e-6, 1e6 * longest
    for _ in range(200):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-longest / middle) < mean:
            low = middle
        else:
            high = middle
    return low


def of_ppo(recipe: Recipe, vocab_size: int) -> Lengths:
    """Return the lengths of the recipe's PPO, by its prompts and its metrics if they are there."""
    cfg = recipe.ppo
    assert cfg is not None
    room = max(1, recipe.model.max_length - cfg.max_response_tokens)
    sources = []
    found = _characters(cfg.prompts)
    if found:
        per_token = chars_per_token(vocab_size)
        kept = [c / per_token + 1 for c in found if c / per_token + 1 <= room] or [room]
        prompt = sum(kept) / len(kept)
        sources.append("prompts by their characters")
    else:
        prompt = room / 2
        sources.append("prompts taken as half of their room")
    response = _measured(recipe.path / "ppo" / "metrics.jsonl")
    if response is None:
        response = RESPONSE_PART * cfg.max_response_tokens
        sources.append("responses taken as half of ppo.max_response_tokens")
    else:
        sources.append("responses as in this run's metrics")
    return Lengths(prompt, response, cfg.max_response_tokens, "; ".join(sources))


def of_records(recipe: Recipe, path: str, vocab_size: int) -> tuple[float, int | None, str]:
    """Return (mean tokens of a demonstration or a response, records, where from).

    A file that is not here is taken to have records of half the longest sequence.
    """
    found = _characters(path)
    if not found:
        return recipe.model.max_length / 2, None, "taken as half of model.max_length"
    mean = sum(found) / len(found) / chars_per_token(vocab_size) + 1
    return min(mean, recipe.model.max_length), _count(path), "by the characters of the records"


def chars_per_token(vocab_size: int) -> float:
    """Return characters per token of English text under a vocabulary of this size."""
    return next((ratio for size, ratio in CHARS_PER_TOKEN.items() if vocab_size <= size), 4.4)


def responses_per_comparison(path: str) -> float:
    """Return K, the mean number of responses of a comparison; 4 where the file is not here."""
    counts = [
        len(record["responses"]) if isinstance(record.get("responses"), list) else 2
        for record in islice(_records(path), NUM_READ)
    ]
    return sum(counts) / len(counts) if counts else 4.0


def _characters(path: str) -> list[int]:
    """Return the characters of the first records: of a sequence, its prompt included."""
    found = []
    for record in islice(_records(path), NUM_READ):
        answers = [record.get(key) for key in ("response", "chosen", "rejected")]
        answers = [*filter(None, answers), *(record.get("responses") or ())]
        has_opening = any(isinstance(each, list) and len(each) > 1 for each in answers)
        opening = None if has_opening else record.get("messages") or record.get("prompt")
        mean = sum(map(_length, answers)) // max(1, len(answers))
        found.append(_length(opening) + mean)
    return found


def _length(said: Any) -> int:
    """Return the characters of a text, or of a chat."""
    if isinstance(said, list):
        return sum(len(str(turn.get("content"))) for turn in said if isinstance(turn, dict))
    return len(str(said or ""))


def _records(path: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file that is here, none of another."""
    file = _local(path)
    if file is None:
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the stage that reads it says what is wrong
                return
            if isinstance(record, dict):
                yield record


def _local(path: str) -> Path | None:
    if path.startswith("builtin:"):
        name = path.partition("/")[2] or "none"
        return next(iter(sorted(cache_dir().glob(f"human-ratings-*/{name}"))), None)
    file = Path(path)
    return file if file.suffix == ".jsonl" and file.is_file() else None


def _count(path: str) -> int | None:
    file = _local(path)
    if file is None:
        return None
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _measured(metrics: Path) -> float | None:
    """Return the mean response of a run's last steps, None before there are any."""
    if not metrics.is_file():
        return None
    lines = metrics.read_text(encoding="utf-8").splitlines()[-10:]
    values = []
    for line in lines:
        try:
            values.append(float(json.loads(line)["rollout/response_length"]))
        except (ValueError, KeyError):  # a line that is being written
            continue
    return sum(values) / len(values) if values else None
