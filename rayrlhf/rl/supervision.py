"""Who is dead, and how it comes back.

A rollout, reference or reward worker holds nothing that cannot be had again. Its `Seat` remembers,
in their order, the calls whose answers are not there yet and those that changed it for good: the
start, and the weights that it has. Whoever takes the seat after a death does all of them again and
is then where its predecessor was, in the middle of a step, or with calls in flight that were made
steps ago; what a call returns is a pure function of them, so nobody sees a difference.

A rank of the actor or the critic holds weights and moments that exist nowhere else. Its death is
`LearnerLost`: all trained ranks go back to a checkpoint together (see state.py), because those
that live hang in a collective with one that does not, and a critic ahead of its actor would make
another run of it.
"""

import textwrap
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions

from rayrlhf import console
from rayrlhf.rl.ranks import RoleSettings

Handle = Any
"""A Ray actor handle, whose methods exist at run time only."""
Ref = Any
"""A reference to an object in Ray's store."""
HOUR_S = 3600.0
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.WorkerCrashedError,
)
"""What Ray answers for a worker that was killed, whose node is lost, or that took the last memory;
ObjectLostError: it had answered, and its node was lost with the answer."""


class GoBack(RuntimeError):
    """The trained roles have to go back to a checkpoint; the run goes on from there."""


class LearnerLost(GoBack):
    """A rank of the actor or the critic died."""


@dataclass(eq=False)
class Call:
    """A call to the worker of a seat, and how to make it again."""

    name: str
    submit: Callable[[Handle], Ref]
    seat: "Seat"
    lasting: bool
    """Whether it changes the worker for good, until the next one of its name."""
    ref: Ref
    started: float = field(default_factory=time.monotonic)
    is_done: bool = False
    is_again: bool = False
    """Whether a successor does it: then it has to be waited for, whoever asked for it."""
    result: Any = None
    stream: Any = None
    """What yields references one by one, and last one to None, or to the error it ended with."""

    def __post_init__(self) -> None:
        if hasattr(self.ref, "completed"):
            self.stream, self.ref = self.ref, self.ref.completed()

    def done(self, result: Any) -> None:
        """Take in the answer."""
        self.result, self.is_done = result, True
        if self.is_again:  # what a successor does next has waited for this
            for each in self.seat.calls:
                each.started = time.monotonic()
        self.seat.forget_what_is_past()


class Seat:
    """The place of one worker: who has it, and what a successor has to do again."""

    def __init__(self, worker: Handle, rank: int) -> None:
        self.worker = worker
        self.rank = rank
        self.calls: list[Call] = []

    def call(self, name: str, submit: Callable[[Handle], Ref], *, lasting: bool) -> Call:
        """Start a call on the worker."""
        call = Call(name, submit, self, lasting, submit(self.worker))
        self.calls.append(call)
        return call

    def forget_what_is_past(self) -> None:
        """Keep the calls that are not done, and before them of each lasting one the last that is.

        Weights that came in the middle of a call (`ppo.interrupt`) stand before it then.
        """
        lasting = {each.name: each for each in self.calls if each.is_done and each.lasting}
        past = [each for each in self.calls if lasting.get(each.name) is each]
        self.calls = [*past, *(each for each in self.calls if not each.is_done)]

    def give_up(self) -> None:
        """Forget the calls that nobody waits for any more; a successor starts all the same."""
        self.calls = [each for each in self.calls if each.is_done or each.name == "start"]

    def pass_on(self, successor: Handle) -> None:
        """Let a new worker do all of it again, in the same order."""
        self.worker = successor
        for call in self.calls:
            call.ref, call.started = call.submit(successor), time.monotonic()
            call.is_done, call.is_again = False, True


class Supervisor:
    """Starts the workers of one role, and others after them; counts how often."""

    def __init__(
        self,
        role: str,
        spawn: Callable[[int, RoleSettings], Handle],
        settings: RoleSettings,
    ) -> None:
        """`spawn(rank, settings)` ends who is in the rank's bundle, and starts a worker there."""
        self.role, self.spawn, self.settings = role, spawn, settings
        self.max_restarts = settings.ppo.max_restarts
        # For good: those that hang again and again, each to its deadline, may be few in an hour.
        self._hung: Counter[int | None] = Counter()
        self.num_restarts = 0
        self._recent: dict[int | None, deque[float]] = defaultdict(deque)

    def replace(self, seat: Seat, call: str, error: Exception) -> None:
        """Put a new worker into the seat of one that died in `call`.

        Raises RuntimeError when those of this seat have died too often within an hour.
        """
        self._count(seat, call, error, seat.rank, "its successor does it again")
        seat.pass_on(self.spawn(seat.rank, self.settings))

    def lose(self, seat: Seat, call: str, error: Exception, what: str = "") -> LearnerLost:
        """Return what a rank's death means for the run; `what` says what else happened to it.

        Raises RuntimeError when ranks of the role have died too often within an hour.
        """
        what = what or _what(error)
        then = "all trained ranks go back to a checkpoint"
        self._count(seat, call, error, None, then, what)
        return LearnerLost(f"{self.role}.{call}: worker {seat.rank} {what}: {reason(error)}")

    def _count(  # noqa: PLR0913 (who, in what, why, how often, what then)
        self,
        seat: Seat,
        call: str,
        error: Exception,
        who: int | None,
        then: str,
        what: str = "",
    ) -> None:
        what, recent, now = what or _what(error), self._recent[who], time.monotonic()
        while recent and now - recent[0] > HOUR_S:
            recent.popleft()
        used = len(recent) + self._hung[who]
        if used >= self.max_restarts:
            raise RuntimeError(
                f"{self.role}.{call}: worker {seat.rank} {what}, after {used} restarts within an "
                f"hour{' or of what hung' if self._hung[who] else ''}: "
                f"ppo.max_restarts={self.max_restarts} allows no more. See why "
                "below and in its log under Ray's session folder; the same command resumes from "
                f"the newest checkpoint. {error}"
            ) from error
        if isinstance(error, TimeoutError):
            self._hung[who] += 1
        else:
            recent.append(now)
        self.num_restarts += 1
        console.say(
            f"ppo: {self.role} worker {seat.rank} {what} in {call}, {then} (restart {used + 1} "
            f"of at most {self.max_restarts} an hour): {reason(error)}"
        )


def _what(error: Exception) -> str:
    return "hangs" if isinstance(error, TimeoutError) else "died"


def reason(error: Exception) -> str:
    """Return why a worker died, in one line: after Ray's heading and indented details."""
    lines = [line for line in str(error).splitlines() if line.strip() and line[0] != "\t"]
    text = lines[1:2] or lines or [type(error).__name__]
    return textwrap.shorten(text[0], width=300, placeholder=" ...")
