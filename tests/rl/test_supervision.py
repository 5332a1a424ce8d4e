"""Workers that die: what their successors do again, how often, and what a lost learner means."""

from collections.abc import Callable
from typing import Any

import pytest
import ray.exceptions
import torch

from rayrlhf.config import RecipeError
from rayrlhf.rl import groups, supervision, waiting
from rayrlhf.rl.experience import Rows
from rayrlhf.rl.groups import ActorGroup, CriticGroup, ReferenceGroup, RolloutGroup
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.supervision import LearnerLost, Supervisor, reason
from rayrlhf.rl.waiting import wait_all
from rayrlhf.transfer import Described
from tests.rl.inline import InlineHandle, InlineRay

DEAD = ray.exceptions.ActorDiedError()
HANGS = object()
Log = list[tuple[Any, ...]]


class Mortal:
    """A worker of any role that notes what it is asked, and answers `answers[call]` where given."""

    def __init__(self, name: str, log: Log, answers: dict[str, Any]) -> None:
        self.name, self.log, self.answers = name, log, answers
        self.version = 0

    def _answer(self, call: str, *args: Any, usually: Any = None) -> Any:
        self.log.append((self.name, call, *args))
        return self.answers.get(call, usually)

    def start(self, *_: Any) -> Any:
        return self._answer("start")

    def address(self) -> Any:
        return self._answer("address", usually=("", 0))

    def log_probs(self, rollout: Any, step: int) -> Any:
        return self._answer("log_probs", step, usually=Rows.of([0], [torch.tensor([float(step)])]))

    def update(self, experience: Any, step: int) -> Any:
        return self._answer("update", step, usually={"loss": 1.0})

    def load_weights(self, version: int, *weights: Any) -> Any:
        self.version = version
        return self._answer("load_weights", version, usually=version)

    def send_weights(self, dtype: str) -> Any:
        return self._answer("send_weights", dtype)

    def receive_weights(self, described: Any, version: int) -> Any:
        return self._answer("receive_weights", version, usually=version)

    def keep_weights(self, *frozen: Any) -> Any:
        return self._answer("keep_weights", *frozen)

    def generate(self, prompts: Any, first: int, step: int) -> Any:
        row = torch.tensor([1])
        rollout = groups.Rollout(*[row] * 6, *[torch.tensor([self.version])] * 2)
        return self._answer("generate", step, usually=rollout)


Make = Callable[..., Any]


@pytest.fixture
def log() -> Log:
    return []


@pytest.fixture
def make(inline_ray: None, settings: Callable[..., RoleSettings], log: Log) -> Make:
    """Return make(group, *answers, max_restarts): answers[i] are those of the i-th worker made."""

    def make(
        kind: type[groups.Group], *answers: dict[str, Any], size: int = 1, max_restarts: int = 3
    ) -> Any:
        left = list(answers)

        def spawn(rank: int, own: RoleSettings) -> InlineHandle:
            name = f"{kind.role}{rank}" + "'" * sum(1 for each in born if each == rank)
            born.append(rank)
            return InlineHandle(Mortal(name, log, left.pop(0) if left else {}))

        born: list[int] = []
        own = settings(max_restarts=max_restarts)
        supervisor = Supervisor(kind.role, spawn, own)
        workers = [spawn(rank, own) for rank in range(size)]
        group = kind(workers, deadline_s=5, supervisor=supervisor)
        group.start().wait()
        return group

    return make


def test_a_successor_repeats_the_call(
    make: Make, log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    group = make(ReferenceGroup, {"log_probs": DEAD})
    assert group.log_probs("rollout", 7).wait().tolist() == [7.0]
    assert log == [
        ("reference0", "start"),
        ("reference0", "log_probs", 7),
        ("reference0'", "start"),
        ("reference0'", "log_probs", 7),
    ]
    assert group.supervisor.num_restarts == 1
    assert capsys.readouterr().out == (
        "ppo: reference worker 0 died in log_probs, its successor does it again (restart 1 of at "
        "most 3 an hour): The actor died unexpectedly before finishing this task.\n"
    )
    group.log_probs("rollout", 8).wait()
    assert log[4:] == [("reference0'", "log_probs", 8)]  # what is past is not repeated


class SomeHang(InlineRay):
    """What has the answer HANGS is never ready."""

    @staticmethod
    def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if ref.value is not HANGS][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]


def test_a_worker_that_hangs_is_replaced(
    make: Make, log: Log, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "ray", SomeHang)
    group = make(ReferenceGroup, {"log_probs": HANGS})
    assert group.log_probs("rollout", 7).wait().tolist() == [7.0]
    assert log[2:] == [("reference0'", "start"), ("reference0'", "log_probs", 7)]
    assert capsys.readouterr().out == (
        "ppo: reference worker 0 hangs in log_probs, its successor does it again (restart 1 of at "
        "most 3 an hour): reference.log_probs is not done after ppo.deadline_s=5 s: see the log of "
        "its worker under Ray's session folder, or raise ppo.deadline_s\n"
    )


@pytest.mark.parametrize("call", ["start", "log_probs"])
def test_what_hangs_at_a_start_or_again_ends_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(waiting, "ray", SomeHang)
    with pytest.raises(TimeoutError, match=rf"^reference\.{call} is not done after"):
        make(ReferenceGroup, *[{call: HANGS}] * 2).log_probs("rollout", 7).wait()


def test_a_learner_that_hangs_is_lost_and_counts_for_good(
    make: Make, settings: Callable[..., RoleSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "ray", SomeHang)
    group = make(CriticGroup, *[{"update": HANGS}] * 4, max_restarts=2)
    monkeypatch.setattr(supervision, "HOUR_S", 0.0)  # a death would be forgotten at once
    for _ in range(2):
        with pytest.raises(LearnerLost, match=r"critic\.update: worker 0 hangs: critic\.update is"):
            group.update("experience", 1).wait()
        group.renew(settings(max_restarts=2)).wait()
    with pytest.raises(RuntimeError, match="after 2 restarts within an hour or of what hung: ppo"):
        group.update("experience", 1).wait()


def test_a_new_engine_catches_up_alone(make: Make, log: Log) -> None:
    group = make(RolloutGroup, {}, {"generate": DEAD}, size=2)
    group.keep_weights(["frozen"]).wait()
    for version in (1, 2):
        group.load_weights(["weights"], version).wait()
    log.clear()
    rollout = group.generate([[1], [2]], 5).wait()
    assert rollout.weight_versions.tolist() == [2, 2]
    assert log == [
        ("rollout0", "generate", 5),
        ("rollout1", "generate", 5),
        ("rollout1'", "start"),
        ("rollout1'", "keep_weights", "frozen"),
        ("rollout1'", "load_weights", 2),
        ("rollout1'", "generate", 5),
    ]


def test_calls_in_flight_are_repeated_under_the_weights_that_they_had(make: Make, log: Log) -> None:
    """A rollout that was asked for before its engine got new weights, and is waited for after."""
    group = make(RolloutGroup, {"generate": DEAD})
    group.load_weights(["weights"], 1).wait()
    flying = group.generate([[1]], 5)
    loading = group.load_weights(["weights"], 2)
    log.clear()
    assert flying.wait().weight_versions.tolist() == [1]
    assert loading.wait() == [2]
    assert log == [
        ("rollout0'", "start"),
        ("rollout0'", "load_weights", 1),
        ("rollout0'", "generate", 5),
        ("rollout0'", "load_weights", 2),
    ]
    assert group.supervisor.num_restarts == 1


def test_what_is_given_up_is_not_repeated_but_for_the_start(make: Make, log: Log) -> None:
    """A successor that nobody has waited for yet dies, too."""
    group = make(RolloutGroup)
    group.renew()
    group.generate([[1]], 5)
    group.give_up()
    group.seats[0].worker.worker.answers["load_weights"] = DEAD
    log.clear()
    assert group.load_weights(["weights"], 1).wait() == [1]
    assert log == [
        ("rollout0'", "load_weights", 1),
        ("rollout0''", "start"),
        ("rollout0''", "load_weights", 1),
    ]


def test_what_a_successor_does_counts_from_when_it_can(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make(RolloutGroup)
    flying = [group.generate([[1]], step) for step in (5, 6)]
    first, second = (pending.calls[0] for pending in flying)
    group.seats[0].pass_on(group.seats[0].worker)
    second.started = 0.0
    clock = iter(range(1000, 2000, 100))
    monkeypatch.setattr(supervision.time, "monotonic", lambda: float(next(clock)))
    first.done("rollout")
    assert second.started >= 1000 and second.is_again


def test_weights_that_nobody_has_any_more_are_the_loss_of_the_actor(make: Make) -> None:
    lost = ray.exceptions.ObjectLostError("00", None, "call")
    group = make(RolloutGroup, {"load_weights": lost})
    with pytest.raises(LearnerLost, match=r"load_weights: worker 0 found no weights"):
        group.load_weights(["weights"], 1).wait()


def test_a_death_between_two_calls_is_noticed_by_the_next(make: Make, log: Log) -> None:
    group = make(RolloutGroup, {"load_weights": DEAD})
    group.generate([[1]], 0).wait()
    log.clear()
    assert group.load_weights(["weights"], 1).wait() == [1]
    assert log[1:] == [("rollout0'", "start"), ("rollout0'", "load_weights", 1)]


def test_a_successor_may_die_too(make: Make, log: Log) -> None:
    group = make(ReferenceGroup, {"log_probs": DEAD}, {"start": DEAD}, {"log_probs": DEAD})
    assert group.log_probs("rollout", 7).wait().tolist() == [7.0]
    assert group.supervisor.num_restarts == 3
    assert [entry[0] for entry in log if entry[1] == "start"] == [
        "reference0" + "'" * number for number in range(4)
    ]


def test_what_a_successor_raises_ends_the_run(make: Make) -> None:
    error = ray.exceptions.RayTaskError("start", "boom", ValueError("boom"))
    group = make(ReferenceGroup, {"log_probs": DEAD}, {"start": error})
    with pytest.raises(RuntimeError, match=r"reference\.start failed: .*boom"):
        group.log_probs("rollout", 7).wait()
    error = ray.exceptions.RayTaskError("start", "x", RecipeError("set this"))
    group = make(ReferenceGroup, {"log_probs": DEAD}, {"start": error})
    with pytest.raises(RecipeError, match="set this"):
        group.log_probs("rollout", 7).wait()


def test_deaths_are_counted_by_worker_and_hour(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    group = make(ReferenceGroup, *[{"log_probs": DEAD}] * 6, size=2, max_restarts=2)
    with pytest.raises(RuntimeError, match=r"reference\.log_probs: worker [01] died, after 2 .*=2"):
        group.log_probs("rollout", 7).wait()

    group = make(ReferenceGroup, *[{"log_probs": DEAD}] * 3, max_restarts=2)
    clock = iter(range(0, 100_000, 1801))

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return float(next(clock))

    with monkeypatch.context() as patched:
        patched.setattr(supervision, "time", Clock)
        for _ in range(9):  # two of them are within any hour
            group.supervisor._count(group.seats[0], "x", DEAD, 0, "again")

    group = make(ReferenceGroup, {"log_probs": DEAD}, max_restarts=0)
    with pytest.raises(RuntimeError, match=r"ppo\.max_restarts=0 allows no more"):
        group.log_probs("rollout", 7).wait()


@pytest.mark.parametrize(
    "death",
    [
        ray.exceptions.ActorUnavailableError("the network is down", None),
        ray.exceptions.NodeDiedError("lost"),
        ray.exceptions.OutOfMemoryError("the node has no memory left"),
        ray.exceptions.ObjectLostError("00", None, "call"),
        ray.exceptions.WorkerCrashedError(),
    ],
)
def test_every_way_to_die(make: Make, death: Exception) -> None:
    group = make(ReferenceGroup, {"log_probs": death})
    assert group.log_probs("rollout", 7).wait().tolist() == [7.0]


def test_a_constructor_that_raises_is_no_death(make: Make) -> None:
    error = ray.exceptions.ActorDiedError(ray.exceptions.RayTaskError("x", "boom", ValueError("")))
    group = make(ReferenceGroup, {"log_probs": error})
    with pytest.raises(RuntimeError, match=r"reference\.log_probs: the worker died"):
        group.log_probs("rollout", 7).wait()
    assert group.supervisor.num_restarts == 0


def test_a_lost_rank_is_a_lost_learner(make: Make) -> None:
    group = make(CriticGroup, {}, {"update": DEAD}, size=2)
    with pytest.raises(LearnerLost, match=r"critic\.update: worker 1 died"):
        wait_all(group.update("experience", 0))
    assert group.supervisor.num_restarts == 1


def test_an_error_in_a_collective_is_that_of_the_rank_that_died(make: Make) -> None:
    """Gloo on the rank that lives is quicker than Ray to say that the connection is lost."""
    error = ray.exceptions.RayTaskError("update", "gloo: connection closed by peer", OSError())
    group = make(CriticGroup, {"update": error}, {"update": DEAD}, size=2)
    with pytest.raises(LearnerLost, match=r"critic\.update: worker 1 died"):
        group.update("experience", 0).wait()

    for others in ({}, {"update": error}):
        group = make(CriticGroup, {"update": error}, others, size=2)
        with pytest.raises(RuntimeError, match=r"critic\.update failed") as raised:
            group.update("experience", 0).wait()
        assert not isinstance(raised.value, LearnerLost)
        assert group.supervisor.num_restarts == 0


def test_a_death_in_a_broadcast_is_found_whoever_speaks_first(make: Make) -> None:
    """Actor and engines are in it together: one's error may be there before the other's death."""
    error = ray.exceptions.RayTaskError("send", "gloo: connection closed by peer", OSError())
    described = Described(("w",), ((1,),), "float32")
    for sends, receives, dead in (
        ({"send_weights": error}, {"receive_weights": DEAD}, "rollout.receive_weights"),
        ({"send_weights": DEAD}, {"receive_weights": error}, "actor.send_weights"),
    ):
        actor, rollout = make(ActorGroup, sends), make(RolloutGroup, receives)
        received = rollout.receive_weights(described, 1, lambda: [])
        for order in (1, -1):
            pending = (actor.send_weights("float32"), received)[::order]
            with pytest.raises(LearnerLost, match=f"{dead}: worker 0 died"):
                wait_all(*pending)
            received = rollout.receive_weights(described, 1, lambda: [])


def test_ranks_are_renewed_together_and_from_other_settings(
    make: Make, log: Log, settings: Callable[..., RoleSettings]
) -> None:
    group = make(CriticGroup, {}, {"update": DEAD}, size=2)
    with pytest.raises(LearnerLost):
        group.update("experience", 0).wait()
    log.clear()
    own = settings(seed=9)
    group.renew(own).wait()
    assert group.supervisor.settings is own
    assert log == [("critic0'", "address"), ("critic0'", "start"), ("critic1'", "start")]


def test_calls_that_nobody_waits_for_are_not_repeated(make: Make, log: Log) -> None:
    group = make(ReferenceGroup, {"log_probs": DEAD})
    group.log_probs("rollout", 6)
    group.give_up()
    log.clear()
    group.log_probs("rollout", 7).wait()
    assert ("reference0'", "log_probs", 6) not in log
    assert log[-1] == ("reference0'", "log_probs", 7)


def test_the_deadline_of_a_repeated_call_begins_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is late when it takes, in all, longer than the deadline because its worker died."""
    group = make(ReferenceGroup, {"log_probs": DEAD})
    pending = group.log_probs("rollout", 7)
    pending.calls[0].started -= 4.9
    timeouts: list[float] = []

    class Watched(InlineRay):
        @staticmethod
        def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            timeouts.append(timeout)
            return InlineRay.wait(refs, num_returns, timeout)

    monkeypatch.setattr(waiting, "ray", Watched)
    pending.wait()
    first, *later = [timeout for timeout in timeouts if timeout]  # 0 only looks who is there, too
    assert first <= waiting.ARRIVE_S and min(later) > 4


def test_a_reason_is_one_line() -> None:
    said = "The actor died unexpectedly.\n\tclass_name: X\n\tpid: 3\nIts node is lost.\nSee docs.\n"
    assert reason(RuntimeError(said)) == "Its node is lost."
    assert reason(RuntimeError("no memory left")) == "no memory left"
    assert reason(RuntimeError()) == "RuntimeError"
    assert len(reason(RuntimeError("word " * 200))) <= 300
