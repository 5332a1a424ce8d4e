"""Early stopping: the best checkpoint by a metric on held-out data, and when to stop looking.

Every rank sees the same metrics and so decides alike. What is known so far lies in each checkpoint,
so that a resumed run decides as an uninterrupted one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config import StageConfig

STATE_FILE = "best.json"


@dataclass(frozen=True)
class Selection:
    """The metric that tells which checkpoint is the best one."""

    metric: str
    higher_is_better: bool


class Best:
    """The best value so far, the step that had it, and how many evaluations were no better."""

    def __init__(self, selection: Selection, patience: int) -> None:
        self.selection = selection
        self.patience = patience
        self.value: float | None = None
        self.step: int | None = None
        self.waited = 0

    @property
    def is_over(self) -> bool:
        """Whether patience has come to its end."""
        return self.waited >= self.patience

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the metrics of step `step`; return whether it is the best one so far.

        Metrics of a step without an evaluation change nothing; NaN is no better than anything.
        """
        found = metrics.get(self.selection.metric)
        if found is None:
            return False
        if self._is_better(found):
            self.value, self.step, self.waited = found, step, 0
            return True
        self.waited += 1
        return False

    def save(self, folder: Path) -> None:
        """Write what `load` needs into a checkpoint's folder."""
        state = {"value": self.value, "step": self.step, "waited": self.waited}
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from `save`; a checkpoint without that state leaves everything open."""
        file = folder / STATE_FILE
        if file.exists():
            state = json.loads(file.read_text(encoding="utf-8"))
            self.value, self.step, self.waited = state["value"], state["step"], state["waited"]

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return value == value
        return value > self.value if self.selection.higher_is_better else value < self.value


def best_of(selection: Selection, cfg: StageConfig) -> Best | None:
    """Return what watches a stage; None where it doesn't stop early."""
    if cfg.early_stopping is None or cfg.eval_every is None:
        return None
    return Best(selection, cfg.early_stopping.patience)
