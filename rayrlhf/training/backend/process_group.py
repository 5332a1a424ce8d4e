"""What the collectives of the sharded backends need."""

import warnings

import torch
import torch.distributed as dist


def need_process_group(device: torch.device) -> None:
    """Make a process group of this process alone, unless there is one."""
    # FSDP2 and DeepSpeed call by their old names what PyTorch has renamed, many times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
