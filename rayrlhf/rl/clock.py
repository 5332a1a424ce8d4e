"""When each phase of a worker ran and what it computed, and a trace of what it ran.

Every worker has a clock. It costs two readings of the time per call; FLOPs are counted where the
worker knows what its model takes per token. `profile.py` makes a table of what the clocks say.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

NUM_SPANS = 4096
"""Spans that a clock remembers, so that one that nobody reads stays small."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Span:
    """A phase that ran once."""

    phase: str
    start: float
    """Unix seconds."""
    end: float = 0.0
    flops: float = 0.0
    """Model FLOPs of this rank, for tokens that are not padding."""


class Clock:
    """Notes the spans of one worker."""

    def __init__(self) -> None:
        self.spans: deque[Span] = deque(maxlen=NUM_SPANS)
        self._open: Span | None = None
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note a span; one within another belongs to the outer one."""
        if self._open is not None:
            yield
            return
        span = self._open = Span(name, time.time())
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            span.end = time.time()
            self.spans.append(span)
            self._open = None

    def count(self, flops: float) -> None:
        """Add to the FLOPs of the span that is open."""
        if self._open is not None:
            self._open.flops += flops

    def read(self) -> list[Span]:
        """Return the spans since the last reading."""
        spans = list(self.spans)
        self.spans.clear()
        return spans

    def start_trace(self) -> None:
        """Record what runs from now on."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def stop_trace(self, path: str) -> None:
        """Write a trace for chrome://tracing or Perfetto."""
        assert self._profiler is not None, "start_trace comes first"
        self._profiler.stop()
        self._profiler.export_chrome_trace(path)
        self._profiler = None


class HasClock(Protocol):
    """A worker."""

    clock: Clock


W = TypeVar("W", bound=HasClock)


def timed(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], T]:
    """Make a worker's method a phase of its clock."""

    def call(self: W, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.clock.phase(method.__name__):
            return method(self, *args, **kwargs)

    update_wrapper(call, method)
    return call
