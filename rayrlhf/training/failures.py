"""What a worker's error does to a run of Ray Train.

Its controller imports this module, which is why it knows of neither torch nor models: a controller
that has to load them first starts its workers seconds later.
"""

from collections.abc import Mapping
from typing import Any

import ray.train
from ray.train import TrainingFailedError, UserCallback

from rayrlhf.config import RecipeError


class NoSecondTry(UserCallback):
    """Ends the run at a worker's RecipeError, which no restart mends, and not after all of them.

    What a callback raises, Ray Train takes for the controller's own error, and those end the run.
    """

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        del run_context
        for error in worker_exceptions.values():
            if (found := _recipe_error(error)) is not None:
                raise found


def _recipe_error(error: BaseException | None) -> RecipeError | None:
    """Return the RecipeError in `error` or in what Ray has wrapped it into."""
    while error is not None and not isinstance(error, RecipeError):
        error = error.__cause__
    return error


def cause_of(error: TrainingFailedError) -> Exception:
    """Return the RecipeError that stopped a worker, if it was one, else `error`."""
    inner: list[Exception] = []
    if isinstance(error, ray.train.WorkerGroupError):
        inner = list(error.worker_failures.values())
    elif isinstance(error, ray.train.ControllerError):
        inner = [error.controller_failure]
    return next((found for each in inner if (found := _recipe_error(each))), error)
