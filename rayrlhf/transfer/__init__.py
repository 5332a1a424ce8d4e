"""Weights from the trainer straight into the engines, without Ray's object store.

    devices   group   who receives
    GPUs      NCCL    vLLM's own engine for weight transfer, packed broadcasts
    CPUs      gloo    an engine of the same interface (gloo.py), which vLLM makes by name

The actor's rank 0 is rank 0 of a group of its own, every process of every engine is another, and
each weight is broadcast once, in the order that both sides agreed on before. It is a collective:
whoever is lost in the middle leaves all others hanging, so they end together (rl/weight_sync.py).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Meeting:
    """Where trainer and engines meet."""

    host: str
    port: int
    world_size: int
    """The trainer's rank 0 and every process of every engine."""
    timeout_s: float
    """For the others to come, and for each broadcast over gloo."""


@dataclass(frozen=True)
class Described:
    """What will be sent, in order."""

    names: tuple[str, ...]
    """Of a Hugging Face checkpoint; a tied head is left out."""
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    """On the way: float32, bfloat16."""
