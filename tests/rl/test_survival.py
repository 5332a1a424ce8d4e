"""A whole run whose workers die, in this process: its metrics are those of an undisturbed one."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.exceptions
from safetensors.torch import load_file

from rayrlhf.config import PPOConfig, parse
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.rl import groups, ppo
from rayrlhf.rl.placement import Roles
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.state import restore, resume_point
from rayrlhf.rl.supervision import Supervisor
from rayrlhf.rl.workers import ActorWorker, CriticWorker, ReferenceWorker
from rayrlhf.training.checkpoint import begin, commit, is_complete
from tests.rl.inline import CountingReward, InlineHandle, InlineMethod, SmallRollout, timeless

Death = tuple[str, str, int]
"""Role, call, and which call of that name it is that the worker dies in."""


KINDS: dict[str, tuple[type[groups.Group], type]] = {
    "actor": (groups.ActorGroup, ActorWorker),
    "critic": (groups.CriticGroup, CriticWorker),
    "reference": (groups.ReferenceGroup, ReferenceWorker),
    "reward": (groups.RewardGroup, CountingReward),
    "rollout": (groups.RolloutGroup, SmallRollout),
}


class MortalHandle(InlineHandle):
    """Dies in the calls that `deaths` names; a dead worker answers nothing."""

    def __init__(self, role: str, worker: Any, deaths: set[Death], count: Counter[Any]) -> None:
        super().__init__(worker)
        self.role, self.deaths, self.count, self.is_dead = role, deaths, count, False

    def __getattr__(self, name: str) -> InlineMethod:
        method = getattr(self.worker, name)

        def call(*args: Any) -> Any:
            self.count[self.role, name] += 1
            death = (self.role, name, self.count[self.role, name])
            if death in self.deaths:
                self.deaths.remove(death)
                self.is_dead = True
            if not self.is_dead:
                return method(*args)
            return ray.exceptions.ActorDiedError()

        return InlineMethod(call)


@pytest.fixture
def run(
    inline_ray: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Return run(name, *deaths, **keys of PPOConfig): train; returns metrics.jsonl."""

    def run(name: str, *deaths: Death, **keys: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        ScalarHeadModel.from_causal_lm(tiny_model).save_pretrained(folder / "reward" / "final")
        (folder / "prompts.jsonl").write_text('{"prompt": "The movie"}\n' * 8, encoding="utf-8")
        left, count = set(deaths), Counter[Any]()

        @contextmanager
        def launch(layout: Any, settings: dict[str, RoleSettings], **_: float) -> Iterator[Roles]:
            fronts = {}
            for role, (kind, worker) in KINDS.items():

                def spawn(
                    rank: int, own: RoleSettings, role: str = role, worker: type = worker
                ) -> Any:
                    return MortalHandle(role, worker(own), left, count)

                supervisor = Supervisor(role, spawn, settings[role])
                workers = [spawn(0, settings[role])]
                fronts[role] = kind(workers, deadline_s=60, supervisor=supervisor)
            roles = Roles(**fronts)  # type: ignore[arg-type]
            roles.start(settings)  # type: ignore[arg-type]
            yield roles

        monkeypatch.setattr(ppo, "launch", launch)
        monkeypatch.setattr(ppo, "cluster_nodes", lambda: [{"CPU": 8.0}])
        monkeypatch.setattr(ppo.session, "connect", lambda recipe: None)
        monkeypatch.setattr(ppo.session, "require", lambda *args, **keys: None)
        final = ppo.train_ppo(
            parse(
                {
                    "name": "x",
                    "run_dir": str(folder),
                    "model": {"path": str(tiny_model), "max_length": 64},
                    "ppo": {
                        "prompts": str(folder / "prompts.jsonl"),
                        "steps": 5,
                        "batch_size": 8,
                        "max_response_tokens": 4,
                        "save_every": 2,
                        "kl_target": 0.1,
                        "kl_horizon": 200,
                        "actor": {"learning_rate": 1e-3},
                        "critic": {"learning_rate": 1e-3},
                        **keys,
                    },
                }
            )
        )
        assert is_complete(final)
        assert not left, "it never came to these calls"
        return read_jsonl(folder / "ppo" / "metrics.jsonl")

    return run


def test_a_run_survives_its_workers(
    run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run("whole")
    assert {row[f"restarts/{role}"] for row in whole for role in KINDS} == {0.0}
    capsys.readouterr()

    replaced = run(
        "replaced",
        ("rollout", "generate", 2),
        ("rollout", "load_weights", 6),
        ("reference", "log_probs", 3),
        ("reward", "score", 3),
        ("reward", "score", 4),
    )
    assert timeless(replaced) == timeless(whole)
    counts = [[row[f"restarts/{role}"] for row in replaced] for role in KINDS]
    assert counts[:2] == [[0.0] * 5] * 2
    assert counts[2:] == [[0, 0, 1, 1, 1], [0, 0, 2, 2, 2], [0, 1, 1, 2, 2]]
    said = capsys.readouterr().out
    assert said.count("its successor does it again") == 5 and "back to" not in said


def test_a_lost_learner_goes_back_to_a_checkpoint(
    run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = timeless(run("whole"))
    deaths: dict[Death, int] = {
        ("critic", "values", 1): 0,
        ("actor", "weights", 3): 0,  # once before the first step
        ("actor", "save", 2): 2,
        ("critic", "save", 1): 0,
        ("critic", "update", 5): 4,
        ("actor", "export", 1): 5,
    }
    for number, (death, back) in enumerate(deaths.items()):
        capsys.readouterr()
        rows = run(f"lost-{number}", death)
        assert timeless(rows) == whole, death
        assert rows[-1][f"restarts/{death[0]}"] == (death[1] != "export")
        assert f"ppo: back to step {back}: " in capsys.readouterr().out


def test_learners_that_die_while_they_go_back_start_once_more(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = run("lost", ("actor", "update", 3), ("critic", "start", 2), ("critic", "start", 3))
    assert timeless(rows) == timeless(run("whole"))
    assert (rows[-1]["restarts/actor"], rows[-1]["restarts/critic"]) == (1, 2)


def test_learners_that_die_while_they_start_do_so_once_more(
    run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    deaths = [("actor", "start", 1), ("critic", "start", 2), ("reward", "start", 1)]
    rows = run("lost", *deaths)
    said = capsys.readouterr().out
    assert timeless(rows) == timeless(run("whole"))
    assert [rows[-1][f"restarts/{role}"] for role in KINDS] == [1, 1, 0, 1, 0]
    assert said.count("died in start, all trained ranks go back") == 2


def test_too_many_deaths_end_the_run_and_keep_its_checkpoint(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    deaths = [("actor", "update", number) for number in (3, 4)]
    with pytest.raises(RuntimeError, match=r"actor\.update: worker 0 died, after 1 restart"):
        run("lost", *deaths, max_restarts=1)
    assert is_complete(tmp_path / "lost" / "ppo" / "checkpoints" / "step-00000002")
    assert timeless(run("lost")) == timeless(run("whole"))


ROLLED_BACK: dict[str, Any] = {
    "steps": 8,
    "kl_target": None,
    "kl_coef": 0.01,
    "samples_per_prompt": 8,
    "actor": {"learning_rate": 1e-2},
    "kl": {"budget": 0.6, "on_exceed": "rollback", "patience": 1, "coef_factor": 100},
}


def test_a_kl_above_budget_goes_back_with_a_larger_coefficient(
    run: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed right after the second time, the same command goes on from there all the same."""
    renew, kills, starts = Roles.renew_trained, [False], []

    def renew_and_look(self: Roles, settings: dict[str, RoleSettings]) -> None:
        renew(self, settings)
        start = Path(settings["actor"].model_path)
        weights, _ = self.actor.seats[0].worker.worker.weights("float32")
        for name, saved in load_file(start / "model.safetensors").items():
            assert np.array_equal(weights[name], saved.numpy()), name  # bit for bit
        starts.append(start.name)
        if kills[0] and len(starts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Roles, "renew_trained", renew_and_look)
    rows = run("whole", **ROLLED_BACK)
    assert len(starts) == 2 and starts[1] == "step-00000002"
    assert [row["kl/rollbacks"] for row in rows] == [1.0] * 2 + [2.0] * 6
    assert [row["kl/coef"] for row in rows] == [1.0] * 2 + [100.0] * 6
    assert all(row["kl/ref_per_response"] <= 0.6 for row in rows)
    assert rows[-1]["kl/over_budget_count"] == 2
    said = capsys.readouterr().out
    assert "the run goes back, and on with a KL coefficient of 1\nppo: back to step 0" in said

    starts.clear()
    kills[0] = True
    with pytest.raises(KeyboardInterrupt):
        run("cut", **ROLLED_BACK)
    kills[0] = False
    assert timeless(run("cut", **ROLLED_BACK)) == timeless(rows)


def test_rollouts_ahead_of_the_learner_go_back_with_it(
    run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What was rolled out by weights that are gone is given up."""
    kl = {**ROLLED_BACK["kl"], "budget": 0.95}
    rows = run("ahead", **{**ROLLED_BACK, "kl": kl, "max_staleness": 1})
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["kl/rollbacks"] == capsys.readouterr().out.count("ppo: back to step") > 0
    assert all(row["kl/ref_per_response"] <= 0.95 for row in rows)
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1] * 4


def test_a_rollback_leaves_no_newer_checkpoint_behind(tmp_path: Path) -> None:
    """Killed before it was renewed, or between two removals: the newest one is not taken."""

    def write(step: int, rollbacks: int) -> Path:
        folder = begin(tmp_path, step)
        (folder / "training_state").mkdir()
        budget = {"in_a_row": 0, "count": 0, "rollbacks": rollbacks, "good_step": 0}
        controller = {"step": step, "version": step, "kl_coef": 0.02, "kl_budget": budget}
        (folder / "training_state" / "controller.json").write_text(json.dumps(controller))
        return commit(folder)

    good, over = write(2, 0), write(4, 0)
    assert resume_point(tmp_path) == (over, None)
    rollback = {"step": 2, "number": 1, "kl_coef": 0.04, "count": 3}
    (tmp_path / "checkpoints" / "kl_rollback.json").write_text(json.dumps(rollback))
    checkpoint, last = resume_point(tmp_path)
    assert checkpoint == good and last is not None and not over.exists()
    state = restore(PPOConfig(prompts="p"), checkpoint, last)
    assert (state.step, state.kl.coef) == (2, 0.04)
    assert (state.budget.rollbacks, state.budget.count) == (1, 3)
    since = write(4, 1)
    assert resume_point(tmp_path) == (since, None)
