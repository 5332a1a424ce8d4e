"""metrics.jsonl: one line a step, also after a resume, and the follower at the terminal."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rayrlhf import config, pipeline
from rayrlhf.config import RecipeError
from rayrlhf.metrics import MetricsLogger, Timer, follow, read_jsonl


def test_a_line_per_step_with_step_and_time_first(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, num_steps=2) as log:
        log.log(1, {"loss": 2.5})
        log.log(2, {"loss": float("nan"), "kl/coef": 0.1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line))[:2] for line in lines] == [["step", "time"]] * 2
    assert json.loads(lines[1])["loss"] is None
    assert json.loads(lines[0])["num_steps"] == 2


def test_resume_drops_lines_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step})
            log.sample(step, {"prompt": "a", "text": str(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ti')
    with MetricsLogger(tmp_path, start_step=3) as log:
        log.log(4, {"loss": 40})
    assert [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert [r["text"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["1", "2", "3"]


def test_follow_shows_new_lines_once(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log:
        log.log(1, {"loss": 1})
    shown: list[tuple[str, int]] = []
    with (
        follow(tmp_path, lambda kind, r: shown.append((kind, r["step"])), interval_s=0.01),
        MetricsLogger(tmp_path, start_step=1) as log,
    ):
        log.log(2, {"loss": 2})
        time.sleep(0.05)
        log.log(3, {"loss": 3})
        log.sample(3, {"prompt": "p", "text": "t"})
    assert [s for s in shown if s[0] == "metrics"] == [("metrics", 2), ("metrics", 3)]
    assert ("samples", 3) in shown


def test_follow_survives_a_resume_that_removes_lines(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": step})
    shown: list[int] = []
    with follow(tmp_path, lambda _, r: shown.append(r["step"]), interval_s=0.01):
        time.sleep(0.03)
        with MetricsLogger(tmp_path, start_step=1) as log:
            time.sleep(0.05)
            log.log(2, {"loss": 20})
    assert shown == [2]


def test_follow_sees_a_file_that_was_replaced_by_a_longer_one(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": step})
    shown: list[int] = []
    with follow(tmp_path, lambda _, r: shown.append(r["step"]), interval_s=60):
        # Between two looks a resumed run removes lines, and writes more than it removed.
        with MetricsLogger(tmp_path) as log:
            log.log(4, {"loss": 4})
        time.sleep(0.01)
    assert shown == [4]
    shown.clear()
    with follow(tmp_path, lambda _, r: shown.append(r["step"]), interval_s=0.01):
        with MetricsLogger(tmp_path, start_step=4) as log:
            log.log(5, {"loss": 5})
            time.sleep(0.1)
        old = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        now = time.time()
        lines = [{"step": step, "time": now + step, "loss": step} for step in range(2, 6)]
        new = tmp_path / "new"
        new.write_text(old[0] + "".join(f"{json.dumps(line)}\n" for line in lines))
        new.replace(tmp_path / "metrics.jsonl")
    assert shown == [5, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", [b'{"step": 2, "ti\n', b"\0\0\0\n", b"7\n", b'{"a": "\xff"}\n'])
def test_a_torn_line_fails_nothing(tmp_path: Path, torn: bytes) -> None:
    shown: list[int] = []
    with (
        follow(tmp_path, lambda _, r: shown.append(r["step"]), interval_s=60),
        MetricsLogger(tmp_path) as log,
    ):
        log.log(1, {"loss": 1})
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(torn)
        log.log(3, {"loss": 3})
    assert shown == [1, 3]
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 3]
    with MetricsLogger(tmp_path, start_step=3):
        pass
    assert torn not in (tmp_path / "metrics.jsonl").read_bytes()


class FakeRun:
    """Stands for a run of W&B."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append((name, step_metric))

    def log(self, metrics: dict[str, float]) -> None:
        self.calls.append(metrics)

    def finish(self) -> None:
        self.calls.append("finish")


def test_wandb_gets_the_same_numbers_and_a_resumed_stage_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begun = FakeRun(), []

    def init(**arguments: Any) -> FakeRun:
        begun.append(arguments)
        return run

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    stage = tmp_path / "toy" / "sft"
    for start in (0, 1):
        with MetricsLogger(stage, start_step=start, trackers=("wandb",)) as log:
            log.log(start + 1, {"loss": 2.5, "eval/loss": float("nan")})
    assert run.calls == [
        ("*", "step"),
        {"step": 1, "loss": 2.5},
        "finish",
        ("*", "step"),
        {"step": 2, "loss": 2.5},
        "finish",
    ]
    assert [each["name"] for each in begun] == ["toy-sft"] * 2
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow"


class FakeMlflow:
    """Stands for MLflow's client; one experiment, one run."""

    calls: list[Any] = []

    def get_experiment_by_name(self, name: str) -> None:
        self.calls.append(name)

    def create_experiment(self, name: str) -> str:
        return f"{name}-1"

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        self.calls.append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
        self.calls.append((run_id, [(key, value, step) for key, value, _, step in metrics]))

    def set_terminated(self, run_id: str) -> None:
        self.calls.append(("end", run_id))


def test_mlflow_gets_the_same_numbers_and_a_resumed_stage_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking, entities = ModuleType("mlflow.tracking"), ModuleType("mlflow.entities")
    tracking.MlflowClient = FakeMlflow  # type: ignore[attr-defined]
    entities.Metric = lambda *values: values  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(FakeMlflow, "calls", [])
    stage = tmp_path / "toy" / "ppo"
    for start in (0, 1):
        with MetricsLogger(stage, start_step=start, trackers=("mlflow",)) as log:
            log.log(start + 1, {"kl/coef": 0.5, "policy/loss": float("nan")})
    assert FakeMlflow.calls == [
        "rayrlhf",
        ("rayrlhf-1", "toy-ppo"),
        ("r1", [("kl/coef", 0.5, 1)]),
        ("end", "r1"),
        ("r1", [("kl/coef", 0.5, 2)]),
        ("end", "r1"),
    ]


@pytest.mark.parametrize(
    ("tracker", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("tensorboard", "")]
)
def test_a_tracker_that_is_not_installed_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tracker: str, package: str
) -> None:
    recipe = config.parse({"name": "toy", "model": {"path": "m"}, "tracking": [tracker]})
    if not package:
        pipeline.require_trackers(recipe)
        return
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=f"not installed: pip install {package}, or take"):
        pipeline.require_trackers(recipe)
    monkeypatch.setitem(sys.modules, tracker, ModuleType(tracker))
    if tracker == "mlflow":
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with pytest.raises(RecipeError, match="set MLFLOW_TRACKING_URI"):
            pipeline.require_trackers(recipe)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker")
    pipeline.require_trackers(recipe)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, trackers=("tensorboard",)) as log:
        log.log(1, {"loss": 2.5})
    files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1
    assert b"loss" in files[0].read_bytes()


def test_timer_adds_up() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.01)
    assert timer.seconds["time/rollout_s"] >= 0.02
