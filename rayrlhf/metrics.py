"""Metrics of a stage: metrics.jsonl, one line per interval or a progress bar, trackers.

The process that trains writes `metrics.jsonl` with a MetricsLogger; the process at the terminal
shows what arrives there with `follow`, so that both can be on different nodes of a cluster.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self


class Timer:
    """Seconds spent in named phases: `with timer("rollout"): ...`, then `timer.seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `time/<phase>_s`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"time/{phase}_s"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


class MetricsLogger:
    """Append one JSON object per step to `<stage_dir>/metrics.jsonl`; samples to samples.jsonl.

    `start_step` is the step of the checkpoint that the run resumes from: lines after it belong
    to work that was lost, and are removed, so that every step stands in the file once.
    `num_steps` is the last step, for the progress bar at the terminal.
    """

    def __init__(
        self,
        stage_dir: str | Path,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
        trackers: tuple[str, ...] = (),
    ) -> None:
        self.dir = Path(stage_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.num_steps = num_steps
        self.path = self.dir / "metrics.jsonl"
        self.samples_path = self.dir / "samples.jsonl"
        for path in (self.path, self.samples_path):
            _keep_until(path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._samples = self.samples_path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(self.dir) if "tensorboard" in trackers else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of `step` (floats; NaN is written as null)."""
        total = {} if self.num_steps is None else {"num_steps": self.num_steps}
        line = {
            "step": step,
            "time": time.time(),
            **total,
            **{k: _finite(v) for k, v in metrics.items()},
        }
        _append(self._file, line)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Write one generated text with its prompt to samples.jsonl."""
        _append(self._samples, {"step": step, "time": time.time(), **record})

    def close(self) -> None:
        """Flush and close every file."""
        self._file.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def follow(
    stage_dir: str | Path, show: Callable[[str, dict[str, Any]], None], *, interval_s: float = 0.5
) -> Iterator[None]:
    """Call `show("metrics" | "samples", record)` for every line that the block's work appends.

    Lines that are there before the block starts are not shown. Reading goes on in a thread, every
    `interval_s` seconds, and once more at the end.
    """
    sources = {kind: Path(stage_dir) / f"{kind}.jsonl" for kind in ("metrics", "samples")}
    seen = {kind: _last_time(path) for kind, path in sources.items()}
    offsets = dict.fromkeys(sources, 0)
    stop = threading.Event()

    def read() -> None:
        for kind, path in sources.items():
            if not path.exists():
                continue
            if path.stat().st_size < offsets[kind]:
                offsets[kind] = 0  # a resumed run removed lines
            with path.open("rb") as file:
                file.seek(offsets[kind])
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # half-written; read again next time
                    offsets[kind] += len(line)
                    record = json.loads(line)
                    if record["time"] > seen[kind]:
                        seen[kind] = record["time"]
                        show(kind, record)

    def watch() -> None:
        while not stop.wait(interval_s):
            read()

    thread = threading.Thread(target=watch, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        read()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSONL file that this module wrote; [] if there is none."""
    file = Path(path)
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _append(file: Any, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _finite(value: float) -> float | None:
    number = float(value)
    return number if number - number == 0 else None


def _keep_until(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a half-written last one; the file is replaced whole."""
    if not path.exists():
        return
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    new = path.with_suffix(".tmp")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _last_time(path: Path) -> float:
    records = read_jsonl(path)
    return records[-1]["time"] if records else 0.0


def _tensorboard(stage_dir: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(logdir=str(stage_dir / "tensorboard"))
