"""Metrics of a stage: metrics.jsonl, one line per interval or a progress bar, trackers.

The process that trains writes `metrics.jsonl` with a MetricsLogger; the process at the terminal
shows what arrives there with `follow`, so that both can be on different nodes of a cluster.
"""

import importlib.util
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self


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


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""What pip installs for each tracker."""
ADDRESSES = {"mlflow": "MLFLOW_TRACKING_URI"}
"""Environment variables without which a tracker has nowhere to write to."""
_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


KINDS = ("metrics", "samples", "notes")
"""Files of a stage, without `.jsonl`."""
PROJECT = "rayrlhf"
"""Of W&B, and experiment of MLflow: both show runs of one project beside each other."""


class Tracker(Protocol):
    """What shows metrics elsewhere while a stage runs."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the finite metrics of one step."""

    def close(self) -> None:
        """Send what is left."""


class MetricsLogger:
    """Append one JSON object per step to `<stage_dir>/metrics.jsonl`; samples to samples.jsonl.

    What a person should look at goes to notes.jsonl, which is there only then.

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
        self.notes_path = self.dir / "notes.jsonl"
        for path in (self.path, self.samples_path, self.notes_path):
            _keep_until(path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._samples = self.samples_path.open("a", encoding="utf-8")
        self._trackers = [_TRACKERS[name](self.dir) for name in trackers]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of `step` (floats; NaN is written as null)."""
        total = {} if self.num_steps is None else {"num_steps": self.num_steps}
        numbers = {name: _finite(value) for name, value in metrics.items()}
        _append(self._file, {"step": step, "time": time.time(), **total, **numbers})
        finite = {name: value for name, value in numbers.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(step, finite)

    def sample(self, step: int, record: Mapping[str, Any]) -> None:
        """Write one generated text with its prompt to samples.jsonl."""
        _append(self._samples, {"step": step, "time": time.time(), **record})

    def note(self, step: int, record: Mapping[str, Any]) -> None:
        """Write what a person should look at, with a `text` for the terminal, to notes.jsonl."""
        values = {k: _finite(v) if isinstance(v, float) else v for k, v in record.items()}
        with self.notes_path.open("a", encoding="utf-8") as file:
            _append(file, {"step": step, "time": time.time(), **values})

    def close(self) -> None:
        """Flush and close every file."""
        self._file.close()
        self._samples.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_installed(tracker: str) -> bool:
    """Tell whether the package of a tracker can be imported; imports nothing."""
    module = _MODULES[tracker]
    return module in sys.modules or importlib.util.find_spec(module) is not None


@contextmanager
def follow(
    stage_dir: str | Path, show: Callable[[str, dict[str, Any]], None], *, interval_s: float = 0.5
) -> Iterator[None]:
    """Call `show(kind, record)` for every line of KINDS that the block's work appends.

    Lines that are there before the block starts are not shown. Reading goes on in a thread, every
    `interval_s` seconds, and once more at the end.
    """
    tails = {kind: _Tail(Path(stage_dir) / f"{kind}.jsonl") for kind in KINDS}
    stop = threading.Event()

    def read() -> None:
        for kind, tail in tails.items():
            for record in tail.read():
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
        for tail in tails.values():
            tail.close()


class _Tail:
    """The lines that come to a file, each once, though a resumed run replaces it by a shorter one.

    The file stays open between two reads, so that no other can get its inode.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        records = read_jsonl(path)
        self._seen: float = records[-1]["time"] if records else 0.0
        self._file: BinaryIO | None = None
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records that are new."""
        file = self._newest()
        if file is None:
            return
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                break  # half-written; read again next time
            self._offset += len(line)
            record = _parse(line)
            if record is not None and record["time"] > self._seen:
                self._seen = record["time"]
                yield record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _newest(self) -> BinaryIO | None:
        """Return the file that has the path's name now, open."""
        try:
            now = self._path.stat()
            if self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), now):
                return self._file
            opened = self._path.open("rb")
        except FileNotFoundError:
            return self._file
        self.close()
        self._file, self._offset = opened, 0
        return opened


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file that this module wrote; [] if there is none.

    What a crash left of a line is none.
    """
    file = Path(path)
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return one line's record, None for a torn one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"step", "time"} <= record.keys() else None


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


class _TensorBoard:
    def __init__(self, stage_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(stage_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of its own per stage, in the project `rayrlhf`; a resumed stage goes on in its run."""

    def __init__(self, stage_dir: Path) -> None:
        import wandb

        name = f"{stage_dir.absolute().parent.name}-{stage_dir.name}"
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=_kept_id(stage_dir / "wandb_run_id", lambda: uuid.uuid4().hex[:16]),
            resume="allow",
            dir=str(stage_dir),
        )
        # W&B's own step only grows, and would drop what a resumed stage does again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of its own per stage, in the experiment `rayrlhf`, which a resumed stage goes on in."""

    def __init__(self, stage_dir: Path) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient()
        name = f"{stage_dir.absolute().parent.name}-{stage_dir.name}"
        self._run_id = _kept_id(stage_dir / "mlflow_run_id", lambda: self._begin(name))

    def _begin(self, name: str) -> str:
        found = self._client.get_experiment_by_name(PROJECT)
        number = found.experiment_id if found else self._client.create_experiment(PROJECT)
        return str(self._client.create_run(number, run_name=name).info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # One request per step, not one per metric.
        rows = [self._metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _kept_id(file: Path, make: Callable[[], str]) -> str:
    """Return the id in `file`, made and written there the first time."""
    if not file.exists():
        file.write_text(make(), encoding="utf-8")
    return file.read_text(encoding="utf-8")


_TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
