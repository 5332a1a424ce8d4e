"""The process group of a rank that trains alone."""

import torch
import torch.distributed as dist


def need_process_group(device: torch.device) -> None:
    """Make a process group of this process alone, unless there is one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
