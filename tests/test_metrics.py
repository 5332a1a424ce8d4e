"""metrics.jsonl: one line a step, also after a resume, and the follower at the terminal."""

import json
import time
from pathlib import Path

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
