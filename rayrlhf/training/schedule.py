"""Learning rate and batch size as pure functions of the step, so that resuming needs no state."""

import math
from bisect import bisect_left
from functools import lru_cache


def warmup_cosine(
    before: float, after: float, *, peak: float, warmup: float, end: float, floor: float
) -> float:
    """Return the learning rate of an update.

    `before` and `after` say how much was done before and after it, in the unit of `warmup` and
    `end`: steps or tokens. Linear to `peak` at `warmup`, then a cosine that reaches `floor` times
    the peak at `end` and stays there. Source: GPT-3, arXiv:2005.14165, appendix B.
    """
    if after <= warmup:
        return peak * after / warmup
    progress = min(1.0, max(0.0, before - warmup) / max(1, end - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * cosine)


class BatchSizes:
    """How many records each step takes: as many, or growing linearly in the records seen.

    A step that has n records behind it takes start + floor((full - start) * n / ramp) of them, up
    to `full`. In whole numbers, so that every machine finds the same; the steps of the ramp are
    counted once (GPT-3's have fewer than 30,000).
    """

    def __init__(self, full: int, start: int | None = None, ramp: int = 0) -> None:
        """`ramp` is the number of records over which batches grow from `start` to `full`."""
        self.full = full
        self._ramp = _positions(full, full if start is None else start, ramp)

    def before(self, step: int) -> int:
        """Return the number of records before step `step` (from 0)."""
        last = len(self._ramp) - 1
        if step <= last:
            return self._ramp[step]
        return self._ramp[last] + (step - last) * self.full

    def steps(self, records: int) -> int:
        """Return the smallest number of steps that take at least `records` records."""
        last = len(self._ramp) - 1
        if records <= self._ramp[last]:
            return bisect_left(self._ramp, records)
        return last - (self._ramp[last] - records) // self.full


@lru_cache(maxsize=4)
def _positions(full: int, start: int, ramp: int) -> tuple[int, ...]:
    """Return the records before each step, up to the first step of `full` records."""
    positions = [0]
    while (seen := positions[-1]) < ramp:
        size = min(full, start + (full - start) * seen // ramp)
        if size == full:
            break
        positions.append(seen + size)
    return tuple(positions)
