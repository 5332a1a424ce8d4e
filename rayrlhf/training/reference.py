"""Log-probs of responses under the model that training starts from: computed once, kept on disk.

While nothing is trained yet, the model's own weights are the reference, so that no second model is
ever held. A killed run goes on with what its file has; one that resumes reads all of it.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rayrlhf.config import RecipeError
from rayrlhf.data import storage
from rayrlhf.training.backend import Backend
from rayrlhf.training.checkpoint import load_tensors, save_tensors

SAVE_EVERY_S = 30.0


class ReferenceLogProbs:
    """One log-prob per response, `values` (num_responses,) float32, nats; NaN: not computed yet."""

    def __init__(self, path: Path, num_responses: int) -> None:
        self.path = path
        self.values = torch.full((num_responses,), torch.nan)
        self._saved = time.monotonic()

    def read(self, backend: Backend, origin: str) -> None:
        """Take what the file has, if it is of `origin` (which rank 0 alone has to know).

        `origin` names what the log-probs belong to. Every rank calls it.
        """
        fits = 0.0
        if backend.rank == 0 and self.path.exists():
            tensors, meta = load_tensors(self.path)
            fits = meta["origin"] == origin and tensors["log_probs"].shape == self.values.shape
        if backend.global_max(fits):
            self.values = load_tensors(self.path)[0]["log_probs"]

    def has(self, responses: Sequence[int]) -> bool:
        """Tell whether all these responses have a log-prob."""
        return not bool(self.values[list(responses)].isnan().any())

    def add(
        self, backend: Backend, responses: Sequence[int], found: Mapping[int, Sequence[float]]
    ) -> None:
        """Take the log-probs of `responses`, of which each rank found some; every rank calls it.

        One that occurs more than once has the mean, one that is known stays as it is. Raises
        RecipeError for a NaN or Inf.
        """
        sums = backend.global_sums(
            [sum(found.get(response, ())) for response in responses]
            + [float(len(found.get(response, ()))) for response in responses]
        )
        means = [
            total / count
            for total, count in zip(sums[: len(responses)], sums[len(responses) :], strict=True)
        ]
        values = torch.tensor(means, dtype=torch.float64).float()
        if not values.isfinite().all():
            raise RecipeError(
                "the start model gives a response a log-prob that is no number: it is broken, or "
                "its precision is too low; set precision=float32, or another init"
            )
        places = torch.tensor(list(responses))
        known = ~self.values[places].isnan()
        self.values[places] = torch.where(known, self.values[places], values)

    def save(self, origin: str, *, after_s: float = 0.0) -> None:
        """Write the file whole, unless it was in the last `after_s` seconds; rank 0 alone."""
        if time.monotonic() - self._saved < after_s:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(self.path) as new:
            save_tensors(new, {"log_probs": self.values}, {"origin": origin})
        self._saved = time.monotonic()
