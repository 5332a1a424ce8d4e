"""A typed front per role: start a call on every worker, and gather what the ranks return.

A call returns a `Pending` at once; `wait_all` waits for several together, so that roles work at the
same time. Every wait has the deadline `ppo.deadline_s` and a line every 30 s, and both the line and
the error name the role and the call.
Arguments that are large travel as references (`share`), which this module never opens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions
import torch
from torch import Tensor

from rayrlhf import console
from rayrlhf.config import RecipeError
from rayrlhf.rl.clock import Span
from rayrlhf.rl.experience import Experience, Rollout, scatter_rows

T = TypeVar("T")
Handle = Any
"""A Ray actor handle, whose methods exist at run time only."""
Ref = Any
"""A reference to an object in Ray's store."""
LINE_EVERY_S = 30.0
"""Seconds between the lines that say what a long wait is for."""


@dataclass
class Pending(Generic[T]):
    """Calls that have started on the workers of one role."""

    role: str
    call: str
    refs: list[Ref]
    gather: Callable[[list[Any]], T]
    deadline_s: float
    fix: str = "see the log of its worker under Ray's session folder"
    """What to do when it is late."""
    started: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """When the wait ends, by the monotonic clock."""
        return self.started + self.deadline_s

    def wait(self) -> T:
        """Return the gathered result; see `wait_all`."""
        _finish([self])
        return self.gather(ray.get(self.refs))


def wait_all(*pending: Pending[Any]) -> list[Any]:
    """Wait for calls that run at the same time; returns their results in order.

    Raises TimeoutError when one is not done by its deadline, and RuntimeError when its worker died
    or raised, as soon as that happens, whatever the others do. Both name the role and the call. A
    RecipeError of a worker is raised as it is.
    """
    _finish(pending)
    return [each.gather(ray.get(each.refs)) for each in pending]


def nothing(_: list[Any]) -> None:
    """Gather the results of calls that return none."""


def absent() -> Pending[None]:
    """Return a call on a role that this learner does not have: it is done, and gives None."""
    return Pending("", "", [], lambda _: None, 0.0)


def share(value: Rollout | Experience) -> Ref:
    """Put a record into the object store once, for all roles."""
    return ray.put(value)


def _finish(pending: Sequence[Pending[Any]]) -> None:
    owner = {ref: each for each in pending for ref in each.refs}
    open_refs = list(owner)
    next_line = time.monotonic() + LINE_EVERY_S
    while open_refs:
        late = min((owner[ref] for ref in open_refs), key=lambda each: each.deadline)
        until = min(late.deadline, next_line)
        ready, _ = ray.wait(open_refs, num_returns=1, timeout=max(0.0, until - time.monotonic()))
        if not ready and until == late.deadline:
            raise TimeoutError(
                f"{late.role}.{late.call} is not done after ppo.deadline_s={late.deadline_s:g} s: "
                f"{late.fix}, or raise ppo.deadline_s"
            )
        for ref in ready:
            _check(owner[ref], ref)
        open_refs = [ref for ref in open_refs if ref not in ready]
        now = time.monotonic()
        if open_refs and now >= next_line:
            names = dict.fromkeys(f"{owner[ref].role}.{owner[ref].call}" for ref in open_refs)
            console.say(f"ppo: waiting for {', '.join(names)}, {late.deadline - now:.0f} s left")
            next_line = now + LINE_EVERY_S


def _check(owner: Pending[Any], ref: Ref) -> None:
    try:
        ray.get(ref)
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(
            f"{owner.role}.{owner.call}: the worker died; run the same command "
            f"again to resume from the newest checkpoint. {error}"
        ) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RecipeError):
            raise error.cause from None
        raise RuntimeError(f"{owner.role}.{owner.call} failed: {error}") from error


class Group:
    """The workers of one role."""

    role = ""

    def __init__(self, workers: Sequence[Handle], *, deadline_s: float) -> None:
        self.workers = list(workers)
        self.deadline_s = deadline_s

    def start(self) -> Pending[None]:
        """Load the model on every worker."""
        return self._pending("start", [w.start.remote() for w in self.workers], nothing)

    def read_clock(self) -> Pending[list[list[Span]]]:
        """Return, for each worker, the phases that ran since the last reading."""
        return self._pending("read_clock", [w.read_clock.remote() for w in self.workers], list)

    def matmul_rate(self) -> Pending[float]:
        """Measure what the workers' matmuls reach together, FLOP/s."""
        return self._pending("matmul_rate", [w.matmul_rate.remote() for w in self.workers], sum)

    def _pending(self, call: str, refs: list[Ref], gather: Callable[[list[Any]], T]) -> Pending[T]:
        return Pending(self.role, call, refs, gather, self.deadline_s)


class TrainedGroup(Group):
    """Ranks that train one model together."""

    def start(self) -> Pending[None]:
        """Join the ranks at rank 0's address, and load model and optimizer."""
        address = self.workers[0].address.remote()
        refs = [w.start.remote(address) for w in self.workers]
        return self._pending("start", refs, nothing)

    def save(self, folder: str) -> Pending[None]:
        """Write weights and training state into a checkpoint folder that exists."""
        return self._pending("save", [w.save.remote(folder) for w in self.workers], nothing)

    def start_trace(self) -> Pending[None]:
        """Record what runs from now on."""
        return self._pending("start_trace", [w.start_trace.remote() for w in self.workers], nothing)

    def stop_trace(self, path: str) -> Pending[None]:
        """Write what ran since `start_trace` to files that begin with `path`."""
        refs = [w.stop_trace.remote(path) for w in self.workers]
        return self._pending("stop_trace", refs, nothing)

    def update(self, experience: Ref, step: int) -> Pending[dict[str, float]]:
        """Train on a shared Experience; returns metrics of the whole group."""
        refs = [w.update.remote(experience, step) for w in self.workers]
        return self._pending("update", refs, _first)


class ActorGroup(TrainedGroup):
    """The policy."""

    role = "actor"

    def log_probs(self, rollout: Ref, step: int) -> Pending[tuple[Tensor, float]]:
        """Return log-probs (N,) of the shared rollout and the mean entropy, nats per token."""
        refs = [w.log_probs.remote(rollout, step) for w in self.workers]

        def gather(parts: list[Any]) -> tuple[Tensor, float]:
            log_probs = scatter_rows([rows for rows, _ in parts])
            return log_probs, sum(entropy for _, entropy in parts) / len(log_probs)

        return self._pending("log_probs", refs, gather)

    def weights(self) -> Pending[Ref]:
        """Return a reference to all weights, {name: float32 array}, which stay where they are."""
        # A wait brings what it waits for to this process: it waits for the flags beside them.
        refs = [w.weights.options(num_returns=2).remote() for w in self.workers]
        done = [flag for flag, _ in refs]
        return Pending(self.role, "weights", done, lambda _: refs[0][1], self.deadline_s)

    def export(self, folder: str) -> Pending[None]:
        """Write the model alone into a folder that exists."""
        return self._pending("export", [w.export.remote(folder) for w in self.workers], nothing)


class CriticGroup(TrainedGroup):
    """The value function."""

    role = "critic"

    def values(self, rollout: Ref, step: int) -> Pending[Tensor]:
        """Return V(state before each token) of the shared rollout: (N,)."""
        refs = [w.values.remote(rollout, step) for w in self.workers]
        return self._pending("values", refs, scatter_rows)


class ReferenceGroup(Group):
    """The policy that the KL penalty is measured against."""

    role = "reference"

    def log_probs(self, rollout: Ref, step: int) -> Pending[Tensor]:
        """Return log-probs (N,) of the shared rollout."""
        refs = [w.log_probs.remote(rollout, step) for w in self.workers]
        return self._pending("log_probs", refs, scatter_rows)


class RewardGroup(Group):
    """The reward model."""

    role = "reward"

    def score(self, rollout: Ref) -> Pending[Tensor]:
        """Return one score per response of the shared rollout: (B,)."""
        refs = [w.score.remote(rollout) for w in self.workers]
        return self._pending("score", refs, scatter_rows)


class RolloutGroup(Group):
    """The engines."""

    role = "rollout"

    def generate(self, prompts: list[list[int]], step: int) -> Pending[Rollout]:
        """Sample G responses per prompt (token ids): B rows, those of one prompt together."""
        shares = torch.arange(len(prompts)).tensor_split(len(self.workers))
        refs = [
            worker.generate.remote([prompts[i] for i in part.tolist()], int(part[0]), step)
            for worker, part in zip(self.workers, shares, strict=True)
            if len(part)
        ]
        return self._pending("generate", refs, Rollout.join)

    def load_weights(self, weights: Ref, version: int) -> Pending[list[int]]:
        """Replace the weights of every engine; returns the version that each acknowledges."""
        refs = [w.load_weights.remote(weights, version) for w in self.workers]
        return self._pending("load_weights", refs, list)


def _first(results: list[dict[str, float]]) -> dict[str, float]:
    """Every rank returns the metrics of the whole group."""
    return results[0]
