"""Whose turn it is, where roles share devices that do not hold all of them (`layout: colocated`).

    turn      who has the memory of the device      calls
    rollout   engine: weights and KV cache          start, generate, probe, load_weights, ...
    actor     optimizer state of the actor          start, update, save
    critic    optimizer state of the critic         start, update, save
    none      nobody: room for activations          start, log_probs, values, score, ...
    any       as it is                              weights, export, clocks

This table is the only place that knows the order. Before a call starts, the calls of the turn
before are waited for, its holder goes to sleep, and the next one wakes: never are two of them awake
on one device. Calls of one turn run at the same time, as they do everywhere else.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rayrlhf.config import Role

HOLDERS: tuple[Role, ...] = ("rollout", "actor", "critic")
OWN_TURN: Mapping[Role, frozenset[str] | None] = {
    "rollout": None,  # whatever an engine does
    "actor": frozenset({"start", "update", "save"}),
    "critic": frozenset({"start", "update", "save"}),
}
"""Calls for which a holder has to be awake; None: all."""
ANY_TURN = frozenset(
    {
        "rest",
        "weights",
        "frozen_weights",
        "keep_weights",
        "dtype",
        "export",
        "read_clock",
        "start_trace",
        "stop_trace",
    }
)
"""Calls that neither need memory of the device nor mind who has it."""


class Sleeper(Protocol):
    """A role that holds memory."""

    role: Role

    def rest(self, asleep: bool) -> Any:
        """Let every worker go to sleep or wake up; returns what to wait for."""


class Turns:
    """Gives the turns; the groups ask before each call, and say what they have started."""

    def __init__(self) -> None:
        self._sleepers: dict[Role, Sleeper] = {}
        self._holder: Role | None = None
        self._running: list[Callable[[], Any]] = []

    def join(self, sleeper: Sleeper) -> None:
        """Take in a role that sleeps between its turns."""
        self._sleepers[sleeper.role] = sleeper

    def take(self, role: Role, call: str) -> None:
        """Return when `call` may start."""
        if call in ANY_TURN:
            return
        turn = holder_of(role, call)
        if turn == self._holder:
            return
        for wait in self._running:
            wait()
        self._running = []
        if self._holder is not None:
            self._sleepers[self._holder].rest(asleep=True).wait()
        self._holder = turn
        # What has not started yet holds nothing, and wakes with its start.
        if turn is not None and call != "start":
            self._sleepers[turn].rest(asleep=False).wait()

    def started(self, call: str, wait: Callable[[], Any]) -> None:
        """Take note of what the next turn has to wait for."""
        if call not in ANY_TURN:
            self._running.append(wait)

    def give_up(self, *, ended: tuple[Role, ...]) -> None:
        """Forget what runs, and roles whose workers were ended."""
        self._running = []
        if self._holder in ended:
            self._holder = None


def holder_of(role: Role, call: str) -> Role | None:
    """Return who has to be awake during a call; None: nobody."""
    if role not in HOLDERS:
        return None
    own = OWN_TURN[role]
    return role if own is None or call in own else None
