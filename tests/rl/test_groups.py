"""Calls to roles: order, deadlines, and errors that name the role and the call."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray.exceptions
import torch

from rayrlhf.config import RecipeError
from rayrlhf.rl import groups, waiting
from rayrlhf.rl.experience import Rows
from rayrlhf.rl.groups import ActorGroup, CriticGroup, RolloutGroup
from rayrlhf.rl.waiting import wait_all
from rayrlhf.rl.weight_sync import sync_weights
from tests.rl.inline import InlineHandle, InlineRay


class Rank:
    """A rank that holds some rows."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def values(self, rollout: Any, step: int) -> Any:
        return Rows.of(self.indices, [torch.tensor([float(i)]) for i in self.indices])


class Late(InlineRay):
    """Nothing is ever ready."""

    @staticmethod
    def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return [], refs


def test_rows_of_all_ranks_come_back_in_order(inline_ray: None) -> None:
    critic = CriticGroup([InlineHandle(Rank([3, 0])), InlineHandle(Rank([1, 2]))], deadline_s=1)
    (values,) = wait_all(critic.values("rollout", 0))
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_deadline_names_the_role_and_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ray", Late)
    critic = CriticGroup([InlineHandle(Rank([0]))], deadline_s=0.01)
    with pytest.raises(TimeoutError, match=r"critic\.values .* ppo\.deadline_s=0\.01"):
        critic.values("rollout", 0).wait()


def test_a_long_wait_says_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One role is done at once, the other in the fourth interval: three have a line."""
    intervals = iter(range(4))

    class Slow(InlineRay):
        @staticmethod
        def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            done = [ref for ref in refs if ref.value.indices == [0]]
            if not done:
                time.sleep(timeout)
                done = refs if next(intervals) == 3 else []
            return done, [ref for ref in refs if ref not in done]

    monkeypatch.setattr(waiting, "ray", Slow)
    monkeypatch.setattr(waiting, "LINE_EVERY_S", 0.02)
    quick, slow = (
        CriticGroup([InlineHandle(Rank(indices))], deadline_s=9.4) for indices in ([0], [1, 0])
    )
    slow.role = "slow"
    wait_all(quick.values("rollout", 0), slow.values("rollout", 0))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ppo: waiting for slow.values, 9 s left"] * 3


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (ray.exceptions.RayActorError(), RuntimeError, r"critic\.values: the worker died"),
        (
            ray.exceptions.RayTaskError("values", "boom", ValueError("boom")),
            RuntimeError,
            r"critic\.values failed: .*boom",
        ),
        (
            ray.exceptions.RayTaskError("values", "x", RecipeError("set this")),
            RecipeError,
            "set this",
        ),
    ],
)
def test_an_error_of_a_worker_names_the_role(
    inline_ray: None, raised: Exception, kind: type[Exception], said: str
) -> None:
    class Broken(Rank):
        def values(self, rollout: Any, step: int) -> Any:
            return raised

    critic = CriticGroup([InlineHandle(Broken([]))], deadline_s=1)
    with pytest.raises(kind, match=said):
        wait_all(critic.values("rollout", 0))


class WeightSource:
    def weights(self, dtype: str) -> Iterator[dict[str, int] | None]:
        assert dtype == "float32"
        yield from ({"w": 1}, {"v": 2}, None)


class Engine:
    def __init__(self, says: int) -> None:
        self.says = says
        self.weights: tuple[dict[str, int], ...] = ()

    def dtype(self) -> str:
        return "float32"

    def load_weights(self, version: int, *weights: dict[str, int]) -> int:
        self.weights = weights
        return self.says


def test_every_engine_acknowledges_the_version(inline_ray: None) -> None:
    engines = [Engine(4), Engine(4)]
    rollout = RolloutGroup([InlineHandle(engine) for engine in engines], deadline_s=1)
    actor = ActorGroup([InlineHandle(WeightSource())], deadline_s=1)
    sync_weights(actor, rollout, version=4)
    assert [engine.weights for engine in engines] == [({"w": 1}, {"v": 2})] * 2
    with pytest.raises(RuntimeError, match="engine 0 acknowledged version 4"):
        sync_weights(actor, rollout, version=5)


def test_weights_never_come_to_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Watched(InlineRay):
        @staticmethod
        def get(refs: Any) -> Any:
            seen.append(InlineRay.get(refs))
            return seen[-1]

        @staticmethod
        def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            seen.extend(ref.value for ref in refs)
            return InlineRay.wait(refs, num_returns, timeout)

    monkeypatch.setattr(waiting, "ray", Watched)
    actor = ActorGroup([InlineHandle(WeightSource()) for _ in range(2)], deadline_s=1)
    assert [ref.value for ref in actor.weights("float32").wait()] == [{"w": 1}, {"v": 2}]
    assert seen
    assert {"w": 1} not in seen


def test_an_error_of_any_rank_that_gathers_is_that_of_the_call(inline_ray: None) -> None:
    class Broken(WeightSource):
        def weights(self, dtype: str) -> Iterator[dict[str, int] | None]:
            yield {"w": 1}
            raise ray.exceptions.RayTaskError("weights", "x", ValueError("no memory"))

    actor = ActorGroup([InlineHandle(WeightSource()), InlineHandle(Broken())], deadline_s=1)
    with pytest.raises(RuntimeError, match=r"actor\.weights failed"):
        actor.weights("float32").wait()


def test_a_sync_that_hangs_names_itself(inline_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = RolloutGroup([InlineHandle(Engine(1))], deadline_s=1)
    assert rollout.dtype() == "float32"
    monkeypatch.setattr(waiting, "ray", Late)
    actor = ActorGroup([InlineHandle(WeightSource())], deadline_s=0.01)
    with pytest.raises(TimeoutError, match=r"actor\.weights"):
        sync_weights(actor, rollout, version=1)


def test_prompts_are_dealt_to_engines_in_order(inline_ray: None) -> None:
    calls: list[tuple[int, int]] = []

    class Recorder:
        def generate(self, prompts: list[list[int]], first: int, step: int) -> Any:
            calls.append((len(prompts), first))
            raise_free = torch.tensor([1])
            return groups.Rollout(*[raise_free] * 8)

    rollout = RolloutGroup([InlineHandle(Recorder()) for _ in range(3)], deadline_s=1)
    rollout.generate([[1]] * 7, 0).wait()
    assert calls == [(3, 0), (2, 3), (2, 5)]
