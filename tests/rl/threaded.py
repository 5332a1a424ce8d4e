"""A stand-in for Ray that really works beside the caller: one thread per worker, calls in order.

The workers are stubs of the five roles that take a given time and know nothing of models.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import ray.exceptions
import torch

from rayrlhf.rl import groups
from rayrlhf.rl.experience import Experience, Rollout, Rows
from rayrlhf.rl.placement import Roles
from rayrlhf.training.checkpoint import STATE_DIR

RESPONSE_TOKENS = 4


class ThreadedRay:
    """The part of Ray that the groups use; a reference is a future."""

    exceptions = ray.exceptions

    @staticmethod
    def put(value: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(value)
        return done

    @staticmethod
    def get(refs: Any) -> Any:
        return [ref.result() for ref in refs] if isinstance(refs, list) else refs.result()

    @staticmethod
    def wait(
        refs: list[Future[Any]], num_returns: int, timeout: float
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        end = time.monotonic() + timeout
        while len(done := [ref for ref in refs if ref.done()]) < num_returns:
            left = end - time.monotonic()
            if left <= 0:
                break
            wait_for([ref for ref in refs if not ref.done()], left, FIRST_COMPLETED)
        return done[:num_returns], [ref for ref in refs if ref not in done[:num_returns]]


class ThreadedMethod:
    def __init__(self, run: ThreadPoolExecutor, function: Callable[..., Any]) -> None:
        self.run, self.function = run, function
        self.num_returns: int | str = 1

    def options(
        self, *, num_returns: int | str = 1, concurrency_group: str = ""
    ) -> "ThreadedMethod":
        run = ThreadPoolExecutor(1) if concurrency_group else self.run
        method = ThreadedMethod(run, self.function)
        method.num_returns = num_returns
        return method

    def remote(self, *args: Any) -> Any:
        def call() -> Any:
            return self.function(*[a.result() if isinstance(a, Future) else a for a in args])

        if self.num_returns == "streaming":
            return ThreadedStream(self.run.submit(lambda: list(call())))
        return self.run.submit(call)


class ThreadedStream:
    """Stands in for a generator of references."""

    def __init__(self, parts: Future[list[Any]]) -> None:
        self.parts = parts

    def completed(self) -> Future[list[Any]]:
        return self.parts

    def __iter__(self) -> Iterator[Future[Any]]:
        return iter([ThreadedRay.put(part) for part in self.parts.result()])


class ThreadedHandle:
    """Stands in for a Ray actor handle: one call at a time, in the order of the calls."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.run = ThreadPoolExecutor(1)

    def __getattr__(self, name: str) -> ThreadedMethod:
        return ThreadedMethod(self.run, getattr(self.worker, name))


class StubRollout:
    """Answers every prompt with the same tokens after `delays`, one per call, the last for ever."""

    def __init__(self, delays: Sequence[float] = (0.0,)) -> None:
        self.delays = list(delays)
        self.version = -1
        self.calls: list[tuple[int, int]] = []
        """Batch, and version of the weights as it was begun."""

    def generate(self, prompts: list[list[int]], first: int, step: int) -> Rollout:
        begun = self.version
        self.calls.append((step, begun))
        time.sleep(self.delays.pop(0) if len(self.delays) > 1 else self.delays[0])
        rows = len(prompts)
        return Rollout(
            prompt_ids=torch.tensor([token for prompt in prompts for token in prompt]),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_ids=torch.full((rows * RESPONSE_TOKENS,), 5),
            response_lengths=torch.full((rows,), RESPONSE_TOKENS),
            log_probs=torch.full((rows * RESPONSE_TOKENS,), -1.0),
            truncated=torch.zeros(rows, dtype=torch.bool),
            weight_versions=torch.full((rows,), begun),
            last_versions=torch.full((rows,), self.version),
        )

    def probe(self, prompts: list[list[int]], temperature: float) -> Rollout:
        return StubRollout().generate(prompts, 0, 0)

    def dtype(self) -> str:
        return "float32"

    def load_weights(self, version: int, *weights: Any) -> int:
        self.version = version
        return version


class StubModel:
    """The other four roles."""

    def __init__(self, update_s: float = 0.0) -> None:
        self.update_s = update_s

    def rows(self, rollout: Rollout) -> Any:
        found = [torch.full((RESPONSE_TOKENS,), -1.0)] * len(rollout)
        return Rows.of(list(range(len(rollout))), found)

    def log_probs(self, rollout: Rollout, step: int) -> Any:
        return self.rows(rollout)

    values = log_probs

    def score(self, rollout: Rollout) -> Any:
        scores = torch.linspace(0, 1, len(rollout)).unsqueeze(1)
        return Rows.of(list(range(len(rollout))), list(scores))

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        time.sleep(self.update_s)
        return {}

    def weights(self, dtype: str) -> Iterator[dict[str, Any] | None]:
        yield from ({}, None)

    def save(self, folder: str) -> None:
        (Path(folder) / STATE_DIR).mkdir(exist_ok=True)


class StubActor(StubModel):
    def probe(self, rollout: Rollout, temperature: float) -> Any:
        return self.rows(rollout)

    def log_probs(self, rollout: Rollout, step: int) -> Any:
        return self.rows(rollout), 1.0


def stub_roles(engines: Sequence[StubRollout], *, update_s: float = 0.0) -> Roles:
    """Return the five roles as stubs in threads."""

    def handles(*workers: Any) -> list[ThreadedHandle]:
        return [ThreadedHandle(worker) for worker in workers]

    return Roles(
        actor=groups.ActorGroup(handles(StubActor(update_s)), deadline_s=20),
        critic=groups.CriticGroup(handles(StubModel(update_s)), deadline_s=20),
        reference=groups.ReferenceGroup(handles(StubModel()), deadline_s=20),
        reward=groups.RewardGroup(handles(StubModel()), deadline_s=20),
        rollout=groups.RolloutGroup(handles(*engines), deadline_s=20),
    )
