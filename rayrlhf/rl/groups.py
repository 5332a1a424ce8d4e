"""A typed front per role: start a call on every worker, and gather what the ranks return.

A call returns a `Pending` at once; `waiting.wait_all` waits for several together, so that roles
work at the same time. What follows when a worker dies: see supervision.py. Arguments that are large
travel as references (`waiting.share`), which this module never opens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import ray.exceptions
import torch
from torch import Tensor

from rayrlhf.config import RewardSource, Role, key_of
from rayrlhf.rl.clock import Span
from rayrlhf.rl.experience import Rollout, scatter_rows
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.supervision import Call, Handle, Ref, Seat, Supervisor
from rayrlhf.rl.turns import HOLDERS, Turns
from rayrlhf.rl.waiting import Pending, nothing
from rayrlhf.transfer import Described, Meeting

T = TypeVar("T")
Submit = Callable[[Handle], Ref]
"""Starts a call on a worker."""
OF_THE_ACTOR = ("load_weights", "keep_weights")
"""Calls that read what the actor has put into the object store."""
WEIGHTS = "weights"
"""Group of threads of an engine that takes weights beside what it generates."""


class Group:
    """The workers of one role, none of which has a state of its own."""

    role: Role

    def __init__(
        self,
        workers: Sequence[Handle],
        *,
        deadline_s: float,
        supervisor: Supervisor | None = None,
        turns: Turns | None = None,
    ) -> None:
        """Without a supervisor, a worker's death ends the run; without turns, devices are owned."""
        self.seats = [Seat(worker, rank) for rank, worker in enumerate(workers)]
        self.deadline_s = deadline_s
        self.supervisor = supervisor
        self.turns = turns
        if turns is not None and self.role in HOLDERS:
            turns.join(self)

    def start(self) -> Pending[None]:
        """Load the model on every worker."""
        return self._all("start", lambda worker: worker.start.remote(), nothing, lasting=True)

    def read_clock(self) -> Pending[list[list[Span]]]:
        """Return, for each worker, the phases that ran since the last reading."""
        return self._all("read_clock", lambda worker: worker.read_clock.remote(), list)

    def matmul_rate(self) -> Pending[float]:
        """Measure what the workers' matmuls reach together, FLOP/s."""
        return self._all("matmul_rate", lambda worker: worker.matmul_rate.remote(), sum)

    def rest(self, asleep: bool) -> Pending[None]:
        """Let every worker leave the device's memory to others, or take it again (turns.py)."""
        return self._all("rest", lambda worker: worker.rest.remote(asleep), nothing, lasting=True)

    def give_up(self) -> None:
        """Forget the calls that have started: nobody will wait for them."""
        for seat in self.seats:
            seat.give_up()

    def _all(
        self,
        call: str,
        submit: Submit,
        gather: Callable[[list[Any]], T],
        *,
        lasting: bool = False,
    ) -> Pending[T]:
        """Start the same call on every worker."""
        work = dict.fromkeys(range(len(self.seats)), submit)
        return self._each(call, work, gather, lasting=lasting)

    def _each(
        self,
        call: str,
        work: Mapping[int, Submit],
        gather: Callable[[list[Any]], T],
        *,
        lasting: bool = False,
    ) -> Pending[T]:
        """Start a call on the workers that are the keys of `work`."""
        if self.turns is not None:
            self.turns.take(self.role, call)
        calls = [
            self.seats[rank].call(call, submit, lasting=lasting) for rank, submit in work.items()
        ]
        died = self._died if self.supervisor else None
        pending = Pending(self.role, call, calls, gather, self.deadline_s, died=died)
        if self.turns is not None:
            self.turns.started(call, pending.wait)
        return pending

    def _died(self, call: Call, error: Exception) -> None:
        assert self.supervisor is not None
        if call.name in OF_THE_ACTOR and isinstance(error, ray.exceptions.ObjectLostError):
            # No successor finds them either: they went with the node of the actor's rank.
            raise self.supervisor.lose(call.seat, call.name, error, "found no weights") from error
        self.supervisor.replace(call.seat, call.name, error)


class TrainedGroup(Group):
    """Ranks that train one model together: when one dies, all of them go back to a checkpoint."""

    def start(self) -> Pending[None]:
        """Join the ranks at rank 0's address, and load model and optimizer."""
        address = self.seats[0].worker.address.remote()
        return self._all("start", lambda worker: worker.start.remote(address), nothing)

    def renew(self, settings: RoleSettings) -> Pending[None]:
        """End every rank, and start new ones from the model and the state that `settings` name."""
        assert self.supervisor is not None
        self.supervisor.settings = settings
        for seat in self.seats:
            seat.worker, seat.calls = self.supervisor.spawn(seat.rank, settings), []
        return self.start()

    def save(self, folder: str) -> Pending[None]:
        """Write weights and training state into a checkpoint folder that exists."""
        return self._all("save", lambda worker: worker.save.remote(folder), nothing)

    def start_trace(self) -> Pending[None]:
        """Record what runs from now on."""
        return self._all("start_trace", lambda worker: worker.start_trace.remote(), nothing)

    def stop_trace(self, path: str) -> Pending[None]:
        """Write what ran since `start_trace` to files that begin with `path`."""
        return self._all("stop_trace", lambda worker: worker.stop_trace.remote(path), nothing)

    def update(self, experience: Ref, step: int) -> Pending[dict[str, float]]:
        """Train on a shared Experience; returns metrics of the whole group."""
        return self._all("update", lambda worker: worker.update.remote(experience, step), _only)

    def _each(
        self,
        call: str,
        work: Mapping[int, Submit],
        gather: Callable[[list[Any]], T],
        *,
        lasting: bool = False,
    ) -> Pending[T]:
        pending = super()._each(call, work, gather, lasting=lasting)
        pending.is_collective = self.supervisor is not None
        return pending

    def _died(self, call: Call, error: Exception) -> None:
        assert self.supervisor is not None
        raise self.supervisor.lose(call.seat, call.name, error) from error


class ActorGroup(TrainedGroup):
    """The policy."""

    role: Role = "actor"

    def log_probs(self, rollout: Ref, step: int) -> Pending[tuple[Tensor, float]]:
        """Return log-probs (N,) of the shared rollout and the mean entropy, nats per token."""

        def gather(parts: list[Any]) -> tuple[Tensor, float]:
            log_probs = scatter_rows([rows for rows, _ in parts])
            return log_probs, sum(entropy for _, entropy in parts) / len(log_probs)

        return self._all("log_probs", lambda worker: worker.log_probs.remote(rollout, step), gather)

    def probe(self, rollout: Ref, temperature: float) -> Pending[Tensor]:
        """Return log-probs (N,) of a shared rollout of any size, at any temperature."""
        return self._all(
            "probe", lambda worker: worker.probe.remote(rollout, temperature), scatter_rows
        )

    def weights(self, dtype: str) -> Pending[list[Ref]]:
        """Return references to buckets of what trains, which stay where they are; see buckets.py.

        They are for engines that compute in `dtype`.
        """
        return self._gathered("weights", lambda worker: worker.weights, dtype)

    def frozen_weights(self, dtype: str) -> Pending[list[Ref]]:
        """Return references to buckets of the weights that stay as they are beside adapters."""
        return self._gathered("frozen_weights", lambda worker: worker.frozen_weights, dtype)

    def _gathered(
        self, call: str, method: Callable[[Handle], Any], dtype: str
    ) -> Pending[list[Ref]]:
        # A wait brings what it waits for to this process: it waits for the end of each stream.
        def submit(worker: Handle) -> Ref:
            return method(worker).options(num_returns="streaming").remote(dtype)

        return self._all(call, submit, lambda found: found[0])

    def open_transfer(self) -> Pending[tuple[str, int]]:
        """Return host and port where the engines can meet rank 0."""
        return self._each("open_transfer", {0: lambda worker: worker.open_transfer.remote()}, _only)

    def join_transfer(self, meeting: Meeting) -> Pending[None]:
        """Let rank 0 meet the engines."""
        return self._all(
            "join_transfer", lambda worker: worker.join_transfer.remote(meeting), nothing
        )

    def described(self, dtype: str) -> Pending[Described]:
        """Return what `send_weights` sends, in order."""
        return self._all("described", lambda worker: worker.described.remote(dtype), _only)

    def send_weights(self, dtype: str) -> Pending[None]:
        """Send all weights to the engines, which have to receive them at the same time."""
        return self._all("send_weights", lambda worker: worker.send_weights.remote(dtype), nothing)

    def export(self, folder: str) -> Pending[None]:
        """Write the model alone into a folder that exists."""
        return self._all("export", lambda worker: worker.export.remote(folder), nothing)


class CriticGroup(TrainedGroup):
    """The value function."""

    role: Role = "critic"

    def values(self, rollout: Ref, step: int) -> Pending[Tensor]:
        """Return V(state before each token) of the shared rollout: (N,)."""
        return self._all("values", lambda worker: worker.values.remote(rollout, step), scatter_rows)


class ReferenceGroup(Group):
    """The policy that the KL penalty is measured against."""

    role: Role = "reference"

    def log_probs(self, rollout: Ref, step: int) -> Pending[Tensor]:
        """Return log-probs (N,) of the shared rollout."""
        return self._all(
            "log_probs", lambda worker: worker.log_probs.remote(rollout, step), scatter_rows
        )


class RewardGroup(Group):
    """The reward model, or all that `ppo.rewards` names."""

    role: Role = "reward"

    def score(
        self, rollout: Ref, rewards: Sequence[RewardSource] = ()
    ) -> Pending[tuple[Tensor, dict[str, float]]]:
        """Return one score per response of the shared rollout (B,), and the means of its parts.

        The score is the weighted sum of the `rewards`; without any, the reward model's.
        """
        columns = [column for reward in rewards for column in reward.columns]

        def gather(parts: list[Any]) -> tuple[Tensor, dict[str, float]]:
            found = scatter_rows(parts)
            if not columns:
                return found, {}
            found = found.view(-1, len(columns))  # (B, C)
            means = dict(zip([metric for metric, _ in columns], found.mean(dim=0), strict=True))
            scores = found @ torch.tensor([weight for _, weight in columns])
            return scores, {metric: float(mean) for metric, mean in means.items()}

        outside = [key_of(i, each) for i, each in enumerate(rewards) if not each.is_of_models]
        call = f"score ({', '.join(outside)})" if outside else "score"
        return self._all(call, lambda worker: worker.score.remote(rollout), gather)


class Broadcast(Protocol):
    """Sends weights straight into the engines (weight_sync.py)."""

    def sync(self, version: int) -> list[int]:
        """Send them; returns the version that each engine has then."""


class RolloutGroup(Group):
    """The engines."""

    role: Role = "rollout"
    broadcast: Broadcast | None = None
    """Who sends weights straight into the engines; None: they come through the object store."""
    _dtype: str | None = None

    def generate(self, prompts: list[list[int]], step: int) -> Pending[Rollout]:
        """Sample G responses per prompt (token ids): B rows, those of one prompt together."""

        def submit(part: list[int]) -> Submit:
            mine = [prompts[i] for i in part]
            return lambda worker: worker.generate.remote(mine, part[0], step)

        shares = torch.arange(len(prompts)).tensor_split(len(self.seats))
        work = {rank: submit(part.tolist()) for rank, part in enumerate(shares) if len(part)}
        return self._each("generate", work, Rollout.join)

    def probe(self, prompts: list[list[int]], temperature: float) -> Pending[Rollout]:
        """Let every engine answer every prompt; 0 is greedy."""
        return self._all(
            "probe", lambda worker: worker.probe.remote(prompts, temperature), Rollout.join
        )

    def reset_prefix_cache(self) -> Pending[None]:
        """Let every engine forget what it knows of prompts."""
        return self._all(
            "reset_prefix_cache", lambda worker: worker.reset_prefix_cache.remote(), nothing
        )

    def dtype(self) -> str:
        """Return what the engines compute in; they are asked once."""
        if self._dtype is None:
            asked = self._all("dtype", lambda worker: worker.dtype.remote(), list)
            self._dtype = ", ".join(dict.fromkeys(asked.wait()))
        return self._dtype

    def generate_part(
        self, prompts: list[list[int]], step: int, *, first: int, engine: int
    ) -> Pending[Rollout]:
        """Let one engine sample for a part of a step's batch, from its prompt `first` on."""

        def submit(worker: Handle) -> Ref:
            return worker.generate.remote(prompts, first, step)

        return self._each("generate", {engine: submit}, Rollout.join)

    def keep_weights(self, frozen: Sequence[Ref]) -> Pending[None]:
        """Give every engine what `load_weights` leaves out from then on; so has a new engine."""

        def submit(worker: Handle) -> Ref:
            return worker.keep_weights.remote(*frozen)

        return self._all("keep_weights", submit, nothing, lasting=True)

    def load_weights(
        self,
        weights: Sequence[Ref],
        version: int,
        *,
        engines: Sequence[int] | None = None,
        at_once: bool = False,
    ) -> Pending[list[int]]:
        """Replace the weights of the engines (None: all); returns the version that each has then.

        Each engine's seat keeps the references: a new engine loads the same version from there.
        `at_once` does so in the middle of what an engine generates (`ppo.interrupt`), else after.
        """

        def submit(seat: Seat) -> Submit:
            asked = seat.worker

            def load(worker: Handle) -> Ref:
                method = worker.load_weights
                # A successor takes them in turn: before that it has no engine to load them into.
                if at_once and worker is asked:
                    method = method.options(concurrency_group=WEIGHTS)
                return method.remote(version, *weights)

            return load

        ranks = range(len(self.seats)) if engines is None else engines
        work = {rank: submit(self.seats[rank]) for rank in ranks}
        return self._each("load_weights", work, list, lasting=True)

    def join_transfer(self, meeting: Meeting, width: int) -> Pending[None]:
        """Let every engine meet the actor's rank 0; each has `width` processes."""

        def submit(worker: Handle) -> Ref:
            return worker.join_transfer.remote(meeting, width)

        return self._shared("join_transfer", dict.fromkeys(range(len(self.seats)), submit), nothing)

    def receive_weights(
        self, described: Described, version: int, catch_up: Callable[[], Sequence[Ref]]
    ) -> Pending[list[int]]:
        """Take all weights as the actor sends them; returns the version that each engine has then.

        A later engine in a seat loads the weights that `catch_up` refers to.
        """

        def submit(seat: Seat) -> Submit:
            asked = seat.worker

            def receive(worker: Handle) -> Ref:
                if worker is asked:
                    return worker.receive_weights.remote(described, version)
                return worker.load_weights.remote(version, *catch_up())

            return receive

        work = {rank: submit(seat) for rank, seat in enumerate(self.seats)}
        return self._shared("receive_weights", work, list, lasting=True)

    def renew(self) -> None:
        """End every engine, and start others, which have the weights of the start until a sync."""
        assert self.supervisor is not None
        for seat in self.seats:
            seat.calls = [each for each in seat.calls if each.name == "start"]
            seat.pass_on(self.supervisor.spawn(seat.rank, self.supervisor.settings))

    def _shared(
        self,
        call: str,
        work: Mapping[int, Submit],
        gather: Callable[[list[Any]], T],
        *,
        lasting: bool = False,
    ) -> Pending[T]:
        """Start what engines and actor do together: a death leaves the others hanging."""
        pending = self._each(call, work, gather, lasting=lasting)
        if self.supervisor is not None:
            pending.died, pending.is_collective = self._lost, True
        return pending

    def _lost(self, call: Call, error: Exception) -> None:
        assert self.supervisor is not None
        if call.is_again:
            return self._died(call, error)
        raise self.supervisor.lose(call.seat, call.name, error) from error


def _only(results: list[T]) -> T:
    """Every rank returns the same, or there is one."""
    return results[0]
