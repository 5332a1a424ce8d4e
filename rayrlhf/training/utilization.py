"""How busy the processors are: model FLOPs per second over what plain matmuls reach on them."""

import resource
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from rayrlhf.training.backend import Backend, forward_precision
from rayrlhf.training.flops import ModelFlops, attended_pairs

if TYPE_CHECKING:  # a benchmark measures where Ray is not installed
    from rayrlhf.training.stage import MicroBatch

MEASURE_S = 0.2
"""Seconds that the measurement of matmuls takes, about; at least three are timed."""


class Meter:
    """Counts what a step computes, and measures once, on all ranks together, what they could."""

    def __init__(self, flops: ModelFlops, backend: Backend) -> None:
        """Measure; every rank calls it."""
        self._flops, self._backend = flops, backend
        is_float32 = forward_precision(backend.cfg, backend.device) == "float32"
        dtype = torch.float32 if is_float32 else torch.bfloat16
        self._rate = backend.rank_sum(matmul_rate(backend.device, dtype))

    def metrics(self, micros: "Iterable[MicroBatch]", seconds: float) -> dict[str, float]:
        """Return `perf/...` of a step over this rank's micro-batches; every rank calls it."""
        flops = sum(
            self._flops.total(
                num_tokens=micro.num_tokens,
                num_pairs=attended_pairs(micro.attention_mask),
                num_outputs=micro.num_outputs,
            )
            for micro in micros
        )

        backend = self._backend
        return {
            "perf/mfu": backend.global_sum(flops) / (seconds * self._rate),
            "perf/matmul_tflops": self._rate / backend.world_size / 1e12,
            "perf/peak_memory_gib": backend.global_max(peak_memory(backend.device)) / 2**30,
        }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of square matmuls on `device` with the threads that torch has now.

    The best of a few, for about MEASURE_S seconds.
    """
    size = 8192 if device.type == "cuda" else 1024
    # Random, as trained numbers are: a GPU multiplies ones faster, for it draws less power.
    source = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, device=device, dtype=dtype, generator=source) for _ in range(2)
    )
    out = torch.empty_like(left)

    def seconds() -> float:
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        return time.perf_counter() - started

    with torch.no_grad():
        times = [seconds() for _ in range(4)][1:]  # the first one warms up
        while sum(times) < MEASURE_S:
            times.append(seconds())
    return 2.0 * size**3 / min(times)


def peak_memory(device: torch.device) -> float:
    """Return the most memory in bytes that this process has held: on its GPU, or in all."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
