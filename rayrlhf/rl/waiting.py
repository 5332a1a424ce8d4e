"""Calls that have started, and how they are waited for.

Every call has the deadline `ppo.deadline_s` and a line every 30 s, and both the line and the error
name the role and the call. What a worker's death means for a call says who started it; a worker
that is not done by the deadline hangs, and is ended as one that died.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions

from rayrlhf import console
from rayrlhf.config import RecipeError
from rayrlhf.rl.experience import Experience, Rollout
from rayrlhf.rl.supervision import DEATHS, Call, Ref

T = TypeVar("T")
LINE_EVERY_S = 30.0
"""Seconds between the lines that say what a long wait is for."""
ARRIVE_S = 0.2
"""What an answer that is there has to get here from another node, before it counts as late."""
NEIGHBOUR_S = 10.0
"""How long after an error in a collective its cause is looked for: a rank that died."""


@dataclass
class Pending(Generic[T]):
    """Calls that have started on the workers of one role."""

    role: str
    call: str
    calls: list[Call]
    gather: Callable[[list[Any]], T]
    deadline_s: float
    fix: str = "see the log of its worker under Ray's session folder"
    """What to do when it is late."""
    died: Callable[[Call, Exception], None] | None = None
    """What a worker's death means: it returns when the call is being done again, or raises."""
    is_collective: bool = False
    """Whether one rank's death makes calls of the others fail, too."""

    @property
    def is_done(self) -> bool:
        """Whether every answer was taken in."""
        return all(call.is_done for call in self.calls)

    def count_from_now(self) -> None:
        """Let the deadline count from now: the workers had other calls to do before."""
        for call in self.calls:
            call.started = time.monotonic()

    def open_calls(self) -> list[Call]:
        """Return what there is to wait for: also what a successor does to catch up."""
        seats = dict.fromkeys(call.seat for call in self.calls)
        again = [call for seat in seats for call in seat.calls if call.is_again]
        return [call for call in [*again, *self.calls] if not call.is_done]

    def wait(self) -> T:
        """Return the gathered result; see `wait_all`."""
        _finish([self])
        return self.gather([call.result for call in self.calls])


def wait_all(*pending: Pending[Any]) -> list[Any]:
    """Wait for calls that run at the same time; returns their results in order.

    What a worker without a state of its own was doing when it died, its successor does again.
    Raises LearnerLost when a rank of a trained role died, and RuntimeError when a worker raised, or
    died too often, as soon as that happens, whatever the others do. A call that is not done by its
    deadline counts as a death; raises TimeoutError where it is a start, or a successor's. All name
    the role and the call. A RecipeError of a worker is raised as it is.
    """
    _finish(pending)
    return [each.gather([call.result for call in each.calls]) for each in pending]


def wait_any(*pending: Pending[Any]) -> None:
    """Take in what is there, and wait if it is none of the calls; raises as `wait_all` does."""
    waiting = _waiting(pending)
    if waiting:
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        _take_in_all(waiting, ready)
    _finish(pending, is_enough=lambda: any(each.is_done for each in pending))


def nothing(_: list[Any]) -> None:
    """Gather the results of calls that return none."""


def known(value: T) -> Pending[T]:
    """Return a call that is done, and gives `value`."""
    return Pending("", "", [], lambda _: value, 0.0)


def absent() -> Pending[None]:
    """Return a call on a role that this learner does not have: it is done, and gives None."""
    return known(None)


def share(value: Rollout | Experience) -> Ref:
    """Put a record into the object store once, for all roles."""
    return ray.put(value)


def _waiting(pending: Sequence[Pending[Any]]) -> dict[Ref, tuple[Pending[Any], Call]]:
    return {call.ref: (each, call) for each in pending for call in each.open_calls()}


def _finish(pending: Sequence[Pending[Any]], is_enough: Callable[[], bool] = lambda: False) -> None:
    next_line = time.monotonic() + LINE_EVERY_S
    while (waiting := _waiting(pending)) and not is_enough():
        late, call = min(waiting.values(), key=lambda pair: pair[1].started + pair[0].deadline_s)
        deadline = call.started + late.deadline_s
        until = min(deadline, next_line)
        refs = list(waiting)
        left = max(ARRIVE_S, until - time.monotonic())
        ready, _ = ray.wait(refs, num_returns=1, timeout=left)
        if not ready and until == deadline:
            _hangs(late, call)
            continue
        if ready and len(refs) > 1:  # one by one, n answers would take n waits for up to n calls
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        _take_in_all(waiting, ready)
        now = time.monotonic()
        if waiting and now >= next_line:
            names = dict.fromkeys(f"{each.role}.{call.name}" for each, call in waiting.values())
            console.say(f"ppo: waiting for {', '.join(names)}, {deadline - now:.0f} s left")
            next_line = now + LINE_EVERY_S


def _take_in_all(waiting: dict[Ref, tuple[Pending[Any], Call]], ready: Sequence[Ref]) -> None:
    answers = _answers(ready)
    for ref, answer in zip(ready, answers, strict=True):
        each, call = waiting.pop(ref)
        if call.ref is ref:  # and no successor does it again
            _take_in(each, call, answer, list(waiting.values()))


def _answers(ready: Sequence[Ref]) -> list[Callable[[], Any]]:
    """Return for each reference what gives its value, or raises what it failed with."""
    try:
        return [partial(_same, value) for value in ray.get(list(ready))]
    except (*DEATHS, ray.exceptions.RayTaskError):  # of one of them: which one is asked again
        return [partial(ray.get, ref) for ref in ready]


def _same(value: T) -> T:
    return value


def _take_in(
    pending: Pending[Any],
    call: Call,
    answer: Callable[[], Any],
    others: Sequence[tuple[Pending[Any], Call]],
) -> None:
    """Take in the answer to a call; see `wait_all`. `others` are waited for at the same time."""
    try:
        call.done(answer() if call.stream is None else _items(call, answer))
    except DEATHS as error:
        _died(pending, call, error)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RecipeError):
            raise error.cause from None
        if pending.is_collective:
            _look_for_the_dead([other for other in others if other[0].is_collective])
        raise RuntimeError(f"{pending.role}.{call.name} failed: {error}") from error


def _items(call: Call, answer: Callable[[], Any]) -> list[Ref]:
    """Return the references of a stream that has ended; raises what it ended with.

    Ray tells of a death by the end of the task, and of an exception by the last item.
    """
    answer()
    refs = list(call.stream)
    ray.get(refs[-1])
    return refs[:-1]


def _hangs(pending: Pending[Any], call: Call) -> None:
    """Take a call that is late as its worker's death, unless another worker would be late, too."""
    error = TimeoutError(
        f"{pending.role}.{call.name} is not done after ppo.deadline_s={pending.deadline_s:g} s: "
        f"{pending.fix}, or raise ppo.deadline_s"
    )
    if pending.died is None or call.is_again or call.name == "start":
        raise error
    pending.died(call, error)


def _died(pending: Pending[Any], call: Call, error: Exception) -> None:
    failed_at_birth = isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed
    if pending.died is None or failed_at_birth:
        raise RuntimeError(
            f"{pending.role}.{call.name}: the worker died; run the same command "
            f"again to resume from the newest checkpoint. {error}"
        ) from error
    pending.died(call, error)


def _look_for_the_dead(others: Sequence[tuple[Pending[Any], Call]]) -> None:
    """Raise LearnerLost when another rank, or engine, died: then it is why a call failed."""
    others = [(pending, call) for pending, call in others if not call.is_done]
    if not others:
        return
    refs = [call.ref for _, call in others]
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=NEIGHBOUR_S)
    for pending, call in others:
        if call.ref in ready:
            try:
                ray.get(call.ref)
            except DEATHS as error:
                _died(pending, call, error)
            except ray.exceptions.RayTaskError:
                continue  # it failed in the same way
