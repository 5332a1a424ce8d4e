"""Roles that share devices take turns: never are two of them awake at the same time."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayrlhf.config import PPOConfig
from rayrlhf.metrics import MetricsLogger, read_jsonl
from rayrlhf.rl import groups, ppo, waiting
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.setup import Prompts
from rayrlhf.rl.state import restore
from rayrlhf.rl.turns import HOLDERS, Turns, holder_of
from tests.rl.threaded import StubActor, StubModel, StubRollout, ThreadedHandle, ThreadedRay

PROMPTS = Prompts([[3, 4, i] for i in range(40)], seed=0, batch_size=4)


class Device:
    """Who is awake, and what went on while who was awake."""

    def __init__(self) -> None:
        self.awake: set[str] = set()
        self.events: list[str] = []
        self.lock = threading.Lock()

    def note(self, role: str, event: str, *, awake: bool | None = None) -> None:
        with self.lock:
            if awake is not None:
                (self.awake.add if awake else self.awake.discard)(role)
            self.events.append(f"{role} {event}")
            assert len(self.awake) <= 1, f"{self.awake} are awake at {role} {event}"


class OnDevice:
    """A stub on a device: a call that needs it asserts who is awake, at its begin and its end."""

    def __init__(self, role: str, stub: Any, device: Device) -> None:
        self.role, self.stub, self.device = role, stub, device

    def start(self, *_: Any) -> None:
        self.device.note(self.role, "starts", awake=True if self.role in HOLDERS else None)

    def address(self) -> tuple[str, int]:
        return "", 0

    def rest(self, asleep: bool) -> None:
        self.device.note(self.role, "sleeps" if asleep else "wakes", awake=not asleep)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            holder = holder_of(self.role, name)  # type: ignore[arg-type]
            needs = name not in ("weights", "export")
            for when in ("begins", "ends"):
                if needs:
                    assert self.device.awake == ({holder} if holder else set()), (self.role, name)
                if when == "begins":
                    time.sleep(0.002)
                    result = getattr(self.stub, name)(*args)
            self.device.note(self.role, name)
            return result

        return call


@pytest.fixture
def colocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Roles, Device]]:
    """All roles on one device, started."""
    monkeypatch.setattr(waiting, "ray", ThreadedRay)
    device, turns = Device(), Turns()

    def group(kind: type[groups.Group], stub: Any) -> Any:
        handles = [ThreadedHandle(OnDevice(kind.role, stub, device))]
        return kind(handles, deadline_s=20, turns=turns)

    roles = Roles(
        actor=group(groups.ActorGroup, StubActor()),
        critic=group(groups.CriticGroup, StubModel()),
        reference=group(groups.ReferenceGroup, StubModel()),
        reward=group(groups.RewardGroup, StubModel()),
        rollout=group(groups.RolloutGroup, StubRollout()),
    )
    waiting.wait_all(*[each.start() for each in roles.groups])
    yield roles, device


def test_never_are_two_awake_on_one_device(
    colocated: tuple[Roles, Device], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    roles, device = colocated
    cfg = PPOConfig(prompts="p", batch_size=4, num_minibatches=1, steps=3, save_every=2)
    with MetricsLogger(tmp_path) as log:
        ppo.optimize(cfg, roles, PROMPTS, restore(cfg, None), log, tokenizer)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    last = device.events[-1 - device.events[::-1].index("rollout generate") :]
    evaluated = ("score", "values", "log_probs")
    steps = [event for event in last if not event.endswith(evaluated)]
    assert steps == [
        "rollout generate",
        "rollout sleeps",  # room to evaluate
        "critic wakes",
        "critic update",
        "critic sleeps",
        "actor wakes",
        "actor update",
        "actor weights",
        "actor sleeps",
        "rollout wakes",
        "rollout load_weights",
        "rollout sleeps",  # moments come back to be written
        "actor wakes",
        "actor save",
        "actor sleeps",
        "critic wakes",
        "critic save",
    ]
    assert device.awake == {"critic"}


def test_each_sleeps_after_its_start(colocated: tuple[Roles, Device]) -> None:
    _, device = colocated
    assert device.events == [
        "actor starts",
        "actor sleeps",
        "critic starts",
        "critic sleeps",
        *device.events[4:6],
        "rollout starts",
    ]
    assert set(device.events[4:6]) == {"reference starts", "reward starts"}  # at the same time


def test_learners_that_were_ended_are_not_sent_to_sleep() -> None:
    class Recorder:
        def __init__(self, role: Any) -> None:
            self.role = role
            self.asked: list[bool] = []

        def rest(self, asleep: bool) -> Any:
            self.asked.append(asleep)
            return waiting.known(None)

    turns, actor, rollout = Turns(), Recorder("actor"), Recorder("rollout")
    for each in (actor, rollout):
        turns.join(each)
    turns.take("actor", "update")
    turns.started("update", lambda: pytest.fail("nobody waits for it any more"))
    turns.give_up(ended=("actor", "critic"))
    turns.take("rollout", "generate")
    assert (actor.asked, rollout.asked) == ([False], [False])
    turns.give_up(ended=("actor", "critic"))  # the engine is awake all the same
    turns.take("actor", "start")
    assert rollout.asked == [False, True]
    assert actor.asked == [False]  # it wakes with its start
