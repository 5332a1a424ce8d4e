"""The trainer's end: rank 0 of the group."""

import datetime
import socket
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rayrlhf.transfer import Meeting

BUFFER_BYTES = 2**28
"""Of a packed broadcast over NCCL; two are on their way at a time."""


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def gloo_group(meeting: Meeting, rank: int) -> Any:
    """Join the group over gloo, which leaves the process's own group of torch as it is."""
    timeout = datetime.timedelta(seconds=meeting.timeout_s)
    store = dist.TCPStore(
        meeting.host, meeting.port, meeting.world_size, is_master=rank == 0, timeout=timeout
    )
    return dist.ProcessGroupGloo(
        dist.PrefixStore("weights", store), rank, meeting.world_size, timeout
    )


def broadcast(group: Any, tensor: Tensor) -> None:
    """Send from rank 0, or receive into `tensor`, over gloo."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


class Sender:
    """Sends all weights to all engines, as often as asked."""

    def __init__(self, meeting: Meeting, device: torch.device) -> None:
        """Wait for the engines; raises an error of torch or vLLM when one does not come in time."""
        self._group: Any
        self._is_nccl = device.type == "cuda"
        if self._is_nccl:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            place = {"master_address": meeting.host, "master_port": meeting.port}
            self._group = trainer_init({**place, "world_size": meeting.world_size})
        else:
            self._group = gloo_group(meeting, rank=0)

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Broadcast tensors that are on the device, in the order that was described."""
        if self._is_nccl:
            from vllm.distributed.weight_transfer.packed_tensor import (
                packed_nccl_broadcast_producer,
            )

            packed_nccl_broadcast_producer(
                iter(weights), self._group, 0, itemgetter(1), buffer_size_bytes=BUFFER_BYTES
            )
            return
        for _, tensor in weights:
            broadcast(self._group, tensor.contiguous())

    def close(self) -> None:
        """Leave the group."""
        if self._is_nccl:
            self._group.destroy()
        self._group = None
