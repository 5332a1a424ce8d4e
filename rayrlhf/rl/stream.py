"""Rollouts that run ahead of the learner, and the weights that reach the engines between them.

A batch is rolled out in parts, one per engine. An engine does its calls in the order in which they
were started, so new weights come after the parts that were started before them. With
`ppo.interrupt` they take a way of their own, and come between two steps of the responses that the
engine is at.

    wait   batch t + n starts on the weights of step t, and step t learns from batch t: no response
           is more than n versions old, and which version made it follows from the step alone.
    drop   every engine always has parts to do. A step takes the parts that were done first; what
           is more than n versions old is left out, and its prompts are rolled out again.

With `wait`, no batch is started across a checkpoint: the first one after it starts on its weights,
as in a run that resumes there. So a resumed run equals an uninterrupted one, at the price of one
rollout per checkpoint that nothing hides. With `drop` or `interrupt` what a step learns from
depends on the clock, and so do its metrics; what was in flight is rolled out again on resume.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import torch

from rayrlhf.config import PPOConfig
from rayrlhf.rl.experience import Rollout
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.waiting import Pending, wait_any
from rayrlhf.rl.weight_sync import check_versions


@dataclass(frozen=True)
class Part:
    """What one engine rolls out of a batch."""

    batch: int
    """Number of the batch; the seeds follow from it and from the place in the batch."""
    first: int
    """Place of its first prompt in the batch."""
    prompts: list[list[int]]


@dataclass(frozen=True)
class Started:
    """A part that an engine has to do."""

    part: Part
    engine: int
    version: int
    """Of the weights that it starts on."""
    loading: Pending[list[int]] | None
    """These weights, where the engine has to take them first."""
    pending: Pending[Rollout]

    def wait(self) -> Rollout:
        """Return the responses; the deadline counts from now, as others were before it."""
        for each in (self.loading, self.pending):
            if each is not None:
                each.count_from_now()
        if self.loading is not None:
            check_versions(self.loading.wait(), self.version)
        return self.pending.wait()


class RolloutStream(ABC):
    """What is rolled out for the steps to come."""

    def __init__(self, cfg: PPOConfig, roles: Roles, prompts: Prompts) -> None:
        self.cfg, self.roles, self.prompts = cfg, roles, prompts
        self.num_engines = len(roles.rollout.seats)
        self.version = -1
        self._sent = [-1] * self.num_engines

    def advance(self, step: int, version: int) -> None:
        """Start what may start now that `step` is next and the learner has weights `version`."""
        if version != self.version:
            is_first, self.version = self.version < 0, version
            self._weights = self.roles.actor.weights(self.roles.rollout.dtype()).wait()
            if self.cfg.interrupt and not is_first:
                loading = self.roles.rollout.load_weights(self._weights, version, at_once=True)
                check_versions(loading.wait(), version)
                self._sent = [version] * self.num_engines
        self._start_more(step)

    def catch_up(self) -> None:
        """Wait until every engine has the newest weights and nothing to do."""
        for started in self._running():
            started.wait()
        behind = [engine for engine, sent in enumerate(self._sent) if sent != self.version]
        if behind:
            loading = self.roles.rollout.load_weights(self._weights, self.version, engines=behind)
            check_versions(loading.wait(), self.version)
            self._sent = [self.version] * self.num_engines

    @abstractmethod
    def take(self, step: int) -> tuple[Rollout, int]:
        """Wait for what `step` learns from; returns it, and how many responses were dropped."""

    @abstractmethod
    def _start_more(self, step: int) -> None: ...

    @abstractmethod
    def _running(self) -> list[Started]:
        """Return what was started and not taken, in that order."""

    def _parts(self, batch: int) -> list[Part]:
        """Cut a batch into one part per engine, none without prompts."""
        prompts = self.prompts.take(batch)
        shares = torch.arange(len(prompts)).tensor_split(self.num_engines)
        return [
            Part(batch, int(share[0]), [prompts[place] for place in share.tolist()])
            for share in shares
            if len(share)
        ]

    def _start(self, part: Part, engine: int) -> Started:
        """Queue a part on an engine, behind the newest weights if it lacks them."""
        loading = None
        if self._sent[engine] != self.version:
            loading = self.roles.rollout.load_weights(self._weights, self.version, engines=[engine])
            self._sent[engine] = self.version
        pending = self.roles.rollout.generate_part(
            part.prompts, part.batch, first=part.first, engine=engine
        )
        return Started(part, engine, self.version, loading, pending)


class InOrder(RolloutStream):
    """`ppo.stale: wait`."""

    def __init__(self, cfg: PPOConfig, roles: Roles, prompts: Prompts) -> None:
        super().__init__(cfg, roles, prompts)
        self._started: dict[int, list[Started]] = {}

    def take(self, step: int) -> tuple[Rollout, int]:
        """Wait for batch `step`."""
        return Rollout.join([started.wait() for started in self._started.pop(step)]), 0

    def _running(self) -> list[Started]:
        return [started for batch in self._started.values() for started in batch]

    def _start_more(self, step: int) -> None:
        before_checkpoint = step + self.cfg.save_every - step % self.cfg.save_every
        end = min(step + self.cfg.max_staleness + 1, before_checkpoint, self.cfg.steps)
        for batch in range(step, end):
            if batch not in self._started:
                self._started[batch] = [
                    self._start(part, engine) for engine, part in enumerate(self._parts(batch))
                ]


class AsReady(RolloutStream):
    """`ppo.stale: drop`."""

    def __init__(self, cfg: PPOConfig, roles: Roles, prompts: Prompts) -> None:
        super().__init__(cfg, roles, prompts)
        self._todo: deque[Part] = deque()
        self._next_batch: int | None = None
        self._started: list[Started] = []
        self._done: list[tuple[Part, Rollout]] = []

    def take(self, step: int) -> tuple[Rollout, int]:
        """Wait until there are parts enough that are not too old."""
        for started in self._started:  # nobody has waited for them meanwhile
            started.pending.count_from_now()
        dropped = 0
        while True:
            self._collect()
            dropped += self._drop()
            self._start_more(step)
            if len(self._done) >= self.num_engines:
                break
            wait_any(*[started.pending for started in self._started])
        taken, self._done = self._done[: self.num_engines], self._done[self.num_engines :]
        return Rollout.join([rollout for _, rollout in taken]), dropped

    def _running(self) -> list[Started]:
        return list(self._started)

    def _collect(self) -> None:
        running, free = [], set()
        for started in self._started:
            if started.pending.is_done:
                self._done.append((started.part, started.wait()))
                free.add(started.engine)
            else:
                running.append(started)
        for started in running:
            if started.engine in free:
                started.pending.count_from_now()
        self._started = running

    def _drop(self) -> int:
        oldest = self.version - self.cfg.max_staleness
        done, self._done, dropped = self._done, [], 0
        for part, rollout in done:
            if int(rollout.weight_versions.min()) < oldest:
                self._todo.appendleft(part)
                dropped += len(rollout)
            else:
                self._done.append((part, rollout))
        return dropped

    def _start_more(self, step: int) -> None:
        """Keep as many parts as max_staleness + 1 steps take, but no more than are left to take."""
        batches = min(self.cfg.max_staleness + 1, self.cfg.steps - step)
        missing = batches * self.num_engines - len(self._started) - len(self._done)
        for _ in range(missing):
            if not self._todo:
                batch = step if self._next_batch is None else self._next_batch
                self._todo.extend(self._parts(batch))
                self._next_batch = batch + 1
            queued = [started.engine for started in self._started]
            engine = min(range(self.num_engines), key=queued.count)
            self._started.append(self._start(self._todo.popleft(), engine))


def make_stream(cfg: PPOConfig, roles: Roles, prompts: Prompts) -> RolloutStream:
    """Return the stream that `ppo.stale` asks for."""
    return (InOrder if cfg.stale == "wait" else AsReady)(cfg, roles, prompts)
