"""Loss spikes: a step whose loss or gradient norm is far above the recent ones has no update.

    loss > mean + threshold * std    or    norm > mean + threshold * std    of the newest updates

The values of skipped steps don't enter the statistics, so that a spike does not raise its own bar.
All values are global ones, so every rank decides alike. Source: PaLM, arXiv:2204.02311, section 5.1
(spikes come of some batches at some weights, and are passed by leaving those out); the rule is that
of OLMo-core's SkipStepAdamW (OLMo 2 32B). ZClip (arXiv:2504.02507) scales such gradients down.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config import LossSpikeConfig, RecipeError

STATE_FILE = "loss_spike.json"


@dataclass(frozen=True)
class Skip:
    """Why a step was skipped."""

    step: int
    what: str
    """`loss` or `grad_norm`."""
    value: float
    limit: float


class SpikeGuard:
    """The newest losses and gradient norms, and what is too far above them."""

    def __init__(self, cfg: LossSpikeConfig) -> None:
        self.cfg = cfg
        self._recent = {name: deque[float](maxlen=cfg.window) for name in ("loss", "grad_norm")}
        self._in_a_row = 0

    def limit(self, name: str) -> float:
        """Return the largest `loss` or `grad_norm` that is usual; Inf before half a window."""
        recent = self._recent[name]
        if len(recent) < self.cfg.window // 2:
            return math.inf
        mean = statistics.fmean(recent)
        return mean + self.cfg.threshold * statistics.stdev(recent, mean)

    def norm_limit(self, loss: float) -> float:
        """Return the largest gradient norm to update with after this loss; -1 for none at all."""
        return self.limit("grad_norm") if loss <= self.limit("loss") else -1.0

    def observe(self, step: int, loss: float, grad_norm: float) -> Skip | None:
        """Take the values of a step; return why it was skipped, None where it was not.

        Raises RecipeError after more than `max_consecutive` skipped steps in a row.
        """
        found = None
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            usual = math.isfinite(value) and value <= self.limit(name)
            if found is None and not usual:
                found = Skip(step, name, value, self.limit(name))
        if found is None:
            self._recent["loss"].append(loss)
            self._recent["grad_norm"].append(grad_norm)
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row > self.cfg.max_consecutive:
            raise RecipeError(
                f"step {step}: {found.what}={found.value:.4g} is above {found.limit:.4g}, and the "
                f"{self.cfg.max_consecutive} steps before were skipped, too: this is no spike. "
                "Lower pretrain.learning_rate and resume from an earlier checkpoint, or raise "
                "pretrain.loss_spike.threshold or max_consecutive"
            )
        return found

    def save(self, folder: Path) -> None:
        """Write what `load` needs into a checkpoint's folder."""
        state = {"in_a_row": self._in_a_row, **{k: list(v) for k, v in self._recent.items()}}
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from `save`; a checkpoint without a guard's state leaves it empty."""
        file = folder / STATE_FILE
        if not file.exists():
            return
        state = json.loads(file.read_text(encoding="utf-8"))
        self._in_a_row = state["in_a_row"]
        for name, recent in self._recent.items():
            recent.clear()
            recent.extend(state[name])
